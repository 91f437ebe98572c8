"""`distbelief bench`: what it refuses, and that each subcommand measures and checks."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from distbelief.cli import cli

KEYS = {
    *("system", "transport", "workers", "shards", "rounds_per_s", "gb_per_s", "cpu_s_per_gb"),
    *(
        "server_rss_mb",
        "server_growth_mb",
        "faults_per_round",
        "server_idle_rss_mb",
        "server_mapped_mb",
        "check",
    ),
}


@pytest.fixture(autouse=True)
def _home_without_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def invoke(*args: str):
    return CliRunner().invoke(cli, ["bench", *args])


def run(*args: str) -> list[dict[str, Any]]:
    """Rows of a command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "distbelief", "bench", *args, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["wire", "--workers", "0"], "'0' is not a whole number above 0"),
        (["wire", "--workers", "1,x"], "'x' is not a whole number above 0"),
        (["wire", "--workers", ""], "'' is not a whole number above 0"),
        (["wire", "--shards", "-1"], "'-1' is not a whole number above 0"),
        (["wire", "--transport", "rdma"], "'rdma' is none of shm, tcp, curve"),
        (["wire", "--size", "0"], "0 is not in the range"),
        (["wire", "--seconds", "0"], "0.0 is not in the range"),
        (["wire", "--windows", "0"], "0 is not in the range"),
        (["wire", "--durability", "journal"], "'journal' is not one of"),
        (["wire", "--plot", "plot.gif"], "ends in neither of .png and .svg"),
        (["wire", "--plot", "no/such/plot.png"], "there is no folder no/such"),
        (["apply", "--rule", "lion"], "'lion' is none of sgd, momentum"),
        (["overlap", "--image", "16"], "16 is not in the range"),
        (["overlap", "--pairs", "1"], "1 is not in the range"),
        (["straggler", "--workers", "1"], "1 is not in the range"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(args, said):
    done = invoke(*args)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_more_shards_than_parts_are_a_problem_and_no_traceback():
    done = invoke("wire", "--size", "100", "--shards", "9")
    assert done.exit_code == 1
    assert "error[DB-MODEL-003]: 9 shards cannot share 100 parameters" in done.stderr


def test_without_matplotlib_nothing_is_measured_that_could_not_be_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke("wire", "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 3
    assert "pip install 'distbelief[bench]'" in done.stderr


def test_a_grid_may_be_a_list_or_options_given_again(monkeypatch):
    seen = []

    def keep(config, on_progress):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("distbelief.bench.wire.wire", keep)
    done = invoke("wire", "--workers", "1,2", "--workers", "4,2", "--transport", "tcp")
    assert done.exit_code == 130
    assert seen[0].workers == [1, 2, 4]
    assert seen[0].transports == ("tcp",)


def test_a_wrong_result_ends_with_exit_code_1(monkeypatch):
    from tests.bench.test_table import ROW

    wrong = replace(ROW, check="wrong", why="3 of 9 parts were torn")
    monkeypatch.setattr("distbelief.bench.wire.wire", lambda config, tell: [ROW, wrong])
    done = invoke("wire", "--json")
    assert done.exit_code == 1
    assert [json.loads(line)["check"] for line in done.stdout.splitlines()] == ["right", "wrong"]
    assert "wrong: 3 of 9 parts were torn" in done.stderr


def test_apply_and_its_table():
    done = invoke("apply", "--rule", "momentum", "--threads", "1", "--size", "5000")
    assert done.exit_code == 0, done.stderr
    title, head, row = done.stdout.splitlines()
    assert title.startswith("5,000 parameters in ")
    assert head.split()[:2] == ["rule", "threads"]
    assert row.split()[0] == "momentum"
    assert row.split()[-1] == "right"


@pytest.mark.long
@pytest.mark.integration
def test_wire_measures_rounds_and_what_comes_back_is_right():
    args = ("--seconds", "0.2", "--windows", "1", "--size", "100001", "--workers", "2")
    rows = run("wire", *args, "--floors", "--transport", "shm,tcp,curve")
    floors = ["shm direct", "zmq simple", "zmq chunk1", "socket chunk1"]
    assert [row["system"] for row in rows] == [*["distbelief"] * 3, *floors]
    assert [row["transport"] for row in rows[:3]] == ["shm", "tcp", "curve"]
    for row in rows:
        assert row.keys() >= KEYS
        assert (row["check"], row["why"]) == ("right", "")
        assert row["looked"] > 0
        assert row["rounds_per_s"] > 0
        assert row["gb_per_s"] == pytest.approx(row["rounds_per_s"] * 8 * 100_001 / 1e9)
        assert row["server_rss_mb"] >= row["server_idle_rss_mb"] > 0
    for mine in rows[:3]:
        assert mine["torn"] == 0
        assert set(floors) < set(mine["ratios"])
    ratio = rows[0]["rounds_per_s"] / rows[3]["rounds_per_s"]
    assert rows[0]["ratios"]["shm direct"]["median"] == pytest.approx(ratio)


@pytest.mark.long
@pytest.mark.integration
def test_snapshots_may_be_written_meanwhile():
    args = ("--seconds", "0.3", "--windows", "1", "--size", "3000", "--shards", "2")
    (row,) = run(
        "wire", *args, "--transport", "shm", "--durability", "snapshots", "--snapshot-every", "0.05"
    )
    assert (row["check"], row["durability"]) == ("right", "snapshots")


@pytest.mark.integration
def test_limits_count_every_byte():
    rows = run("limits", "--size", "50000", "--seconds", "0.01", "--repeats", "1")
    assert {row["check"] for row in rows} == {"right"}
    assert {row["unit"] for row in rows} == {"GB/s", "us"}
    assert all(row["value"] > 0 for row in rows)
    assert len({row["item"] for row in rows}) == len(rows) == 19


@pytest.mark.integration
def test_overlap_trains_both_models_alike():
    args = ("--batch", "2", "--image", "32", "--pairs", "3", "--width", "0.05")
    (row,) = run("overlap", *args)
    assert (row["check"], row["pairs"], row["overlap"]) == ("right", 3, True)
    assert row["max_difference"] < row["max_change"] / 1000
    assert row["ratio_p10"] <= row["ratio"] <= row["ratio_p90"]


@pytest.mark.long
@pytest.mark.integration
def test_a_straggler_holds_up_all_reduce_and_not_ours():
    args = ("--workers", "2", "--sleep", "0.02", "--slow", "0.2", "--size", "1000")
    (row,) = run("straggler", *args, "--seconds", "0.5", "--windows", "1")
    assert (row["check"], row["why"]) == ("right", "")
    assert row["samples"] > 0
    # All-reduce goes at the pace of the slow one: 2 x 32 / 0.2 s = 320; ours at 32 / 0.02 more.
    assert row["to_synchronous"]["median"] > 2
