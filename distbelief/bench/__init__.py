"""Bench: what this system can do on this machine, next to what the machine and others can.

A *system* is some processes doing one piece of work over and over (system.py). A *crew* is the
processes of one system that are alive (crew.py); they and the driver meet at a *board* of
counters (board.py). A *race* runs the crews in turns, one *window* at a time, so that neighbours
can be compared (race.py, window.py). Each subcommand of `distbelief bench` is a file: wire, apply,
limits, overlap, straggler.
"""
