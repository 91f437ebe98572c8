"""docs/cli.md names every command, what its lines of JSON have, and exit codes that are ours."""

import re

import click
import pytest

from distbelief.cli import COMMANDS, cli
from distbelief.record import EventRecord, FindingRecord, Tick
from distbelief.sight import Counted, Done, Kpi, Stale

CODES = {0, 1, 2, 3, 4, 5, 130, 141, 143}


@pytest.fixture(scope="module")
def text(repo_root):
    return (repo_root / "docs/cli.md").read_text(encoding="utf-8")


def all_commands():
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        if isinstance(command, click.Group):
            yield from (f"{name} {sub}" for sub in command.commands)
        else:
            yield name


def test_the_table_has_every_command_once_and_no_other(text):
    table = text.partition("| exit codes |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| ([a-z -]+) \|", table, re.M)
    assert named == list(all_commands())


def test_every_row_has_a_purpose_and_exit_codes_that_there_are(text):
    table = text.partition("| exit codes |")[2].partition("\n\n")[0]
    for row in table.splitlines()[2:]:
        _, _, purpose, codes, _ = row.split("|")
        assert len(purpose) > 10, row
        found = set(map(int, re.findall(r"\d+", codes)))
        assert (found and found <= CODES) or "as " in codes, row


@pytest.mark.parametrize("shape", [Tick, EventRecord, FindingRecord])
def test_every_field_of_a_line_is_in_the_docs(text, shape):
    kind = shape.__struct_config__.tag
    (row,) = re.findall(rf"^\| {kind} \|.*$", text, re.M)
    listed = re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("|")[2])
    assert listed == [name for name in shape.__struct_fields__ if name not in ("v", "run")]


@pytest.mark.parametrize("shape", [Kpi, Stale, Counted, Done])
def test_every_number_of_a_tick_is_in_the_docs(text, shape):
    told = text.partition("`kpi` is that")[2]
    for name in shape.__struct_fields__:
        assert f"`{name}`" in told, name
