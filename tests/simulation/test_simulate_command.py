import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from distbelief.bench.work import GOOGLENET_SIZE
from distbelief.cli import cli
from distbelief.commands.simulate import MODELS
from distbelief.simulation.constants import Constants
from distbelief.simulation.defaults import DEFAULTS
from distbelief.simulation.forecast import forecast
from distbelief.simulation.plot import plot
from tests.helpers.clusters import CLUSTER, INSTANT


def simulate(*args):
    return CliRunner().invoke(cli, ["simulate", *args])


def test_it_says_what_to_expect_and_holds_it_against_the_law():
    answer = simulate("--workers", "16", "--straggler", "1x6", "--minutes", "2", "--json")
    said = json.loads(answer.stdout)
    assert (said["type"], said["v"], said["law"]) == ("simulation", 1, 15)
    assert said["mean"] == pytest.approx(15, rel=0.03)
    assert said["max"] > 3 * said["p95"]
    assert said["straggler_share"] < 0.3 * said["fair_share"]
    assert said["shards"] == said["advice"]["shards"] == said["advice"]["wanted"]
    assert said["bottleneck"] == "compute"
    assert said["parameters"] == MODELS["googlenet"] == GOOGLENET_SIZE


def test_a_line_of_json_has_these_fields():
    answer = simulate("--workers", "2", "--minutes", "0.5", "--worker-mtbf", "6h", "--json")
    said = json.loads(answer.stdout)
    assert set(said) == {
        *("type", "v", "workers", "shards", "hosts", "seconds", "updates_per_s", "samples_per_s"),
        *("alone", "efficiency", "mean", "law", "p50", "p95", "p99", "max", "waiting", "load"),
        *("bottleneck", "straggler_share", "fair_share", "lost_workers", "lost_shards"),
        *("parameters", "advice", "cluster"),
    }
    links = {"link in", "link out", "worker link"}
    assert set(said["load"]) == {"shard thread", "network thread"} | links
    assert all(0 <= share <= 1 for share in said["load"].values())
    assert set(said["advice"]) == {
        *("shards", "wanted", "most", "by", "worker_link", "reason", "is_enough"),
    }
    assert said["cluster"]["worker_mtbf_s"] == 21_600
    assert said["cluster"]["shard_mtbf_s"] is None
    assert (said["cluster"]["step_s"], said["cluster"]["noise"]) == (0.84, 0.06)


def test_it_says_so_for_people_too():
    answer = simulate(
        "--workers", "4", "--straggler", "2x3", "--shard-mtbf", "20s", "--minutes", "1"
    )
    assert answer.exit_code == 0
    assert "the law says 3" in answer.stdout
    assert "each of 2 stragglers: 3x slower" in answer.stdout
    assert "fair share 25.00 %" in answer.stdout
    assert "bottleneck" in answer.stdout
    assert "keep up (shard thread" in answer.stdout
    assert "were lost in this time" in answer.stdout


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """matplotlib keeps the files of its fonts open from its first picture on."""
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("plots") / "first.png"
    told = forecast(replace(CLUSTER, workers=1), INSTANT, seconds=5)
    plot(path, "title", [told, replace(told, workers=100)])


@pytest.mark.usefixtures("drawing")
def test_several_numbers_of_workers_are_a_table_and_a_picture(tmp_path):
    picture = tmp_path / "cluster.png"
    said = ("--workers", "1,2", "--workers", "16", "--shards", "2", "--minutes", "0.1")
    answer = simulate(*said, "--plot", str(picture))
    assert answer.exit_code == 0, answer.output
    rows = [line.split() for line in answer.stdout.splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [("1", "2"), ("2", "2"), ("16", "2")]
    assert [row[-1] for row in rows] == ["compute"] * 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_worker_is_never_stale():
    said = json.loads(simulate("--workers", "1", "--minutes", "1", "--json").stdout)
    assert (said["mean"], said["max"], said["straggler_share"]) == (0, 0, None)


def test_a_model_has_no_more_shards_than_parts():
    answer = simulate("--workers", "20", "--minutes", "0.02", "--link", "0.1")
    assert "27 parts, so there may be no more shards" in answer.stdout
    answer = simulate("--workers", "8", "--per-host", "8", "--link", "1", "--minutes", "1")
    assert "fewer workers a host" in answer.stdout


def test_lengths_of_steps_and_constants_come_from_files(tmp_path):
    steps, constants = tmp_path / "steps.txt", tmp_path / "constants.json"
    steps.write_text("0.4\n0.6\n")
    constants.write_text(DEFAULTS.to_json())
    args = ("--workers", "2", "--minutes", "1", "--json", "--steps", str(steps))
    said = json.loads(simulate(*args, "--constants", str(constants)).stdout)
    assert said["updates_per_s"] == pytest.approx(4, rel=0.1)
    assert (said["cluster"]["step_s"], said["cluster"]["measured"]) == (0.5, 2)


@pytest.mark.slow
def test_constants_are_measured_into_a_file(tmp_path):
    path = tmp_path / "here.json"
    answer = simulate("--measure", str(path))
    assert answer.exit_code == 0
    assert Constants.from_json(path.read_text()).source.startswith("20")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--straggler", "6"], "not NxFACTOR"),
        (["--straggler", "9x2", "--workers", "4"], "at most 4"),
        (["--n-fetch", "3", "--n-push", "2"], "no multiple"),
        (["--workers", "5000", "--minutes", "600"], "fewer minutes"),
        (["--workers", "5001"], "more than 5000"),
        (["--workers", "0"], "whole number above 0"),
        (["--workers", "1", "--step", "600", "--minutes", "0.5"], "nothing was pushed"),
        (["--shards", "some"], "nor auto"),
        (["--shards", "28"], "at most 27"),
        (["--worker-mtbf", "soon"], "no duration"),
        (["--step", "0"], "--step"),
        (["--link", "0"], "--link"),
        (["--constants", __file__], "--measure"),
        (["--steps", __file__], "a number of seconds a line"),
        (["--steps", os.devnull], "--steps"),
        (["--plot", "picture.txt"], "ends in neither"),
        (["--plot", "no/such/picture.png"], "no folder"),
    ],
)
def test_what_cannot_be_played_is_said(args, text):
    answer = simulate(*args)
    assert answer.exit_code == 2
    assert "Error:" in answer.stderr
    assert text in " ".join(answer.stderr.split())


def test_without_matplotlib_nothing_is_played_that_could_not_be_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = simulate("--workers", "1,2", "--plot", str(tmp_path / "a.png"))
    assert (answer.exit_code, "DB-ENV-004" in answer.stderr) == (3, True)


def test_torch_is_not_loaded_for_a_forecast():
    program = (
        "import sys\nfrom distbelief.cli import cli\n"
        "cli(['simulate', '--workers', '1', '--minutes', '0.1'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
