"""The members of an ensemble: who they are, how each is launched, and how one goes on."""

import json

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.commands.train_ensemble import _command
from distbelief.problem import Problem
from distbelief.roster import FILE, Member, Roster, read_roster


def test_seven_members_see_the_data_in_other_orders_and_one_is_wider(tmp_path):
    roster = Roster.of(tmp_path / "e", 7, 0.5, 1.25, ("--recipe", "paper"))
    assert [member.data_seed for member in roster.members] == list(range(1, 8))
    assert [member.width for member in roster.members] == [0.0] * 6 + [0.625]
    roster.write()
    assert read_roster(tmp_path / "e") == roster


@pytest.mark.parametrize(("number", "wider"), [(1, 1.25), (3, 1.0)])
def test_one_alone_and_a_factor_of_1_make_nobody_wider(tmp_path, number, wider):
    assert {m.width for m in Roster.of(tmp_path, number, 1.0, wider, ()).members} == {0.0}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--width", "0.5"),
        ("--width=0.5",),
        ("--set", "model.width=0.5"),
        ("--set=model.width=0.5",),
    ],
)
def test_a_wider_member_is_launched_with_its_own_width(tmp_path, arguments):
    given = ("job.toml", *arguments, "--workers", "2")
    roster = Roster.of(tmp_path, 2, 0.5, 2.0, given)
    first, last = (_command(roster, member)[3:] for member in roster.members)
    assert first[: 1 + len(given)] == ["launch", *given]
    assert last[1:4] == ["job.toml", "--workers", "2"]
    assert "model.width=1.0" in last
    assert "data.seed=1" in first
    assert "data.seed=2" in last
    assert first[first.index("--run-dir") + 1] == str(tmp_path / "member-1")


def test_a_member_that_was_cut_off_is_resumed_and_one_that_is_done_is_not_made_again(tmp_path):
    roster = Roster.of(tmp_path, 2, 1.0, 1.0, ())
    one, two = roster.members
    for member, exit_word in ((one, "done"), (two, "stopped")):
        run = roster.place(member) / "20261124-1"
        run.mkdir(parents=True)
        (run / "config.toml").write_text("")
        (run / "result.json").write_text(json.dumps({"exit": exit_word}))
        (run / "checkpoint.json").write_text(json.dumps({"samples": 1}))
        (run / "model.safetensors").touch()
    assert roster.is_done(one)
    assert not roster.is_done(two)
    assert roster.done == [tmp_path / "member-1" / "20261124-1"]
    assert _command(roster, two)[3:5] == ["resume", str(tmp_path / "member-2" / "20261124-1")]


def test_a_damaged_roster_is_told(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(Problem, match="DB-RUN-002"):
        read_roster(tmp_path)
    assert read_roster(tmp_path / "none") is None


def test_settings_of_a_member():
    assert Member(number=3, data_seed=3, width=0.0).settings == ["data.seed=3"]
    assert Member(number=7, data_seed=7, width=1.25).settings == [
        "data.seed=7",
        "model.width=1.25",
    ]


def test_another_ensemble_in_the_folder_is_refused(tmp_path):
    Roster.of(tmp_path, 3, 1.0, 1.0, ("--lr", "0.1")).write()
    call = ["train-ensemble", "--out", str(tmp_path)]
    for more in (["--members", "4"], ["--lr", "0.2"]):
        answer = CliRunner().invoke(cli, [*call, *more])
        assert answer.exit_code == 2
        assert "DB-USE-014" in answer.output
        assert "--lr 0.1" in answer.output
