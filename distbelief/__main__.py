"""`python -m distbelief` is the `distbelief` command."""

from distbelief.cli import main

if __name__ == "__main__":
    main()
