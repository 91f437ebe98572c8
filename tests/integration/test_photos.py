"""144 crops of 100 real photographs: a bar, bounded memory, the same on 0, 1 and 2 processes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.model_file import save_model

PEAK_MAX = 1_800_000
"""KiB of any process, less than the crops of 100 photographs take as bytes (2.1 million; as floats
8.5 million). Torch, 32 crops at width 0.125 and a photograph at 352 pixels take 0.55 million on one
kind of processor, 1.27 million on another, whose convolutions need more room."""

MEASURED = """
import json, resource, subprocess, sys
told = subprocess.run(sys.argv[1:], check=True, capture_output=True).stdout.decode()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({**json.loads(told), "peak": peak}))
"""


@pytest.fixture
def run(test_data: Path, tmp_path: Path):
    """Makes the folder of a narrow GoogLeNet with its first weights, for so many loaders."""

    def make(loaders: int) -> Path:
        said = {
            "data.source": f"folder:{test_data}/imagenet-photos",
            "data.image_size": 224,
            "data.loaders": loaders,
            "model.factory": "googlenet",
            "model.width": 0.125,
            "model.args.init": "xavier",
            "model.args.aux": False,
            "threads": 1,
        }
        job = load_job(None, said, ())
        path = tmp_path / f"run-{loaders}"
        path.mkdir()
        (path / "config.toml").write_text(job.to_toml())
        save_model(make_model(job, open_data(job, "train")), path / "model.safetensors")
        return path

    return make


def command(run: Path, crops: int) -> list[str]:
    base = [sys.executable, "-m", "distbelief", "eval", str(run), "--split", "train"]
    return [*base, "--crops", str(crops)]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("crops", [10, 144])
def test_any_number_of_processes_gives_the_same_numbers_in_bounded_memory(run, crops: int):
    found = []
    for loaders in (0, 1, 2):
        call = [sys.executable, "-c", MEASURED, *command(run(loaders), crops), "--json"]
        told = json.loads(subprocess.run(call, check=True, capture_output=True).stdout)
        assert told["peak"] < PEAK_MAX
        found.append({key: told[key] for key in ("top1", "top5", "loss")})
    assert found[0] == found[1] == found[2]
    assert found[0]["loss"] == pytest.approx(4.6, abs=1.0)  # 100 classes, first weights


def test_a_bar_shows_how_far_it_is(run):
    call = command(run(1), 10)
    child = pexpect.spawn(call[0], call[1:], timeout=120, encoding="utf-8", dimensions=(24, 120))
    try:
        child.expect(r"images .*\d+/100")
        child.expect(r"([1-9]\d?)/100")
        child.expect(r"top-1")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
        time.sleep(0.1)
    assert child.exitstatus == 0
