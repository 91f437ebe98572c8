import json

import pytest
from click.testing import CliRunner

from distbelief.cli import cli


def simulate(*args):
    return CliRunner().invoke(cli, ["simulate", *args])


def test_it_says_what_to_expect_and_holds_it_against_the_law():
    answer = simulate("--workers", "16", "--straggler", "1x6", "--minutes", "2", "--json")
    said = json.loads(answer.stdout)
    assert (said["type"], said["v"], said["law"]) == ("simulation", 1, 15)
    assert said["mean"] == pytest.approx(15, rel=0.02)
    assert said["max"] > 3 * said["p95"]
    assert said["straggler_share"] < 0.3 * said["fair_share"]
    assert said["updates_per_s"] < said["updates_per_s_without"]


def test_it_says_so_for_people_too():
    answer = simulate("--workers", "4", "--straggler", "2x3", "--minutes", "1")
    assert answer.exit_code == 0
    assert "the law says 3" in answer.stdout
    assert "each of 2 stragglers: 3x slower" in answer.stdout
    assert "fair share 25.00 %" in answer.stdout


def test_one_worker_is_never_stale():
    said = json.loads(simulate("--workers", "1", "--minutes", "1", "--json").stdout)
    assert (said["mean"], said["max"], said["straggler_share"]) == (0, 0, None)


@pytest.mark.parametrize(
    "args",
    [
        ["--straggler", "6"],
        ["--straggler", "9x2", "--workers", "4"],
        ["--n-fetch", "3", "--n-push", "2"],
        ["--workers", "5000", "--minutes", "600"],
        ["--workers", "1", "--step", "600", "--minutes", "0.5"],
    ],
)
def test_what_cannot_be_played_is_said(args):
    answer = simulate(*args)
    assert answer.exit_code == 2
    assert "Error:" in answer.stderr
