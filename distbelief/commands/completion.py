"""`distbelief completion`: what a shell needs to complete our commands and the ids of runs."""

import click
from click.shell_completion import get_completion_class


@click.command("completion", short_help="Print what a shell needs to complete.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: commands, options and the ids of runs.

    \b
    Examples:
      eval "$(distbelief completion bash)"       in ~/.bashrc
      eval "$(distbelief completion zsh)"        in ~/.zshrc
      distbelief completion fish > ~/.config/fish/completions/distbelief.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click knows the three
    root = ctx.find_root()
    complete = made(root.command, {}, "distbelief", "_DISTBELIEF_COMPLETE")
    # Not complete.source(): for bash that starts one to see whether it is recent enough.
    click.echo(complete.source_template % complete.source_vars())
