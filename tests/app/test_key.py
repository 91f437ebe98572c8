"""Keys: what the classes say of themselves, and that the documents say the same."""

import re

import pytest

from distbelief.commands.config import toml_value
from distbelief.job import Job, compose
from distbelief.key import all_keys, find_keys
from distbelief.problem import Problem
from distbelief.settings import gather


def row(key):
    default = "" if key.default is None else f"`{toml_value(key.default)}`"
    return f"| {key.name} | {key.flag} | {default} | {key.meaning.rstrip('.')} |"


def test_the_documented_table_of_keys_is_what_the_classes_say(repo_root):
    """To mend it, put the rows of the message into docs/configuration.md."""
    text = (repo_root / "docs/configuration.md").read_text()
    table = re.findall(r"^\| [a-z_.0-9]+ \| (?:--[a-z-]+)? \| .*$", text, re.M)
    rows = [re.sub(r" +", " ", row(key)) for key in all_keys()]
    assert [re.sub(r" +", " ", line) for line in table] == rows, "\n".join(rows)


def test_every_key_of_a_job_is_there_with_its_default():
    defaults = {key.name: key.default for key in all_keys() if key.default is not None}
    flags = {name: value for name, value in defaults.items() if value != {}}
    assert compose(gather(flags=flags)) == Job()
    assert len(all_keys()) == len({key.name for key in all_keys()})


def test_every_key_has_a_meaning():
    assert [key.name for key in all_keys() if len(key.meaning) < 10] == []


def test_a_section_names_its_keys_and_a_factory_argument_the_mapping():
    assert [key.name for key in find_keys("save")][:2] == ["save.every_s", "save.keep"]
    assert [key.name for key in find_keys("train.lr")] == ["train.lr"]
    assert [key.name for key in find_keys("model.args.depth")] == ["model.args"]


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(Problem) as caught:
        find_keys("train.bach_size")
    assert caught.value.fix == "did you mean train.batch_size?"
    with pytest.raises(Problem) as caught:
        find_keys("xyz")
    assert caught.value.fix == "distbelief config show has all of them"
