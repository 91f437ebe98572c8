"""The examples learn, alone and by four workers; the README's two changed lines are all."""

import difflib
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

SAMPLES = 1437
EPOCHS = 20
NEEDS = {"lightning_digits": ["pytorch_lightning"], "huggingface_digits": ["transformers"]}
"""Example -> modules that not every installation has."""
EXAMPLES = ["script", *NEEDS]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def example(request, repo_root):
    """The path of an example; skipped where what it needs is not installed."""
    missing = [m for m in NEEDS.get(request.param, []) if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return repo_root / "docs" / "examples" / f"{request.param}.py"


def changed_lines(examples):
    before, after = (
        (examples / name).read_text().splitlines() for name in ("plain.py", "script.py")
    )
    diff = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    return [line for line in diff if not line.startswith("@@")]


def run(command, folder):
    """Run to the end in a folder of its own; what it wrote to stdout, by lines."""
    # A launcher that runs these tests must not be taken for the run's own.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def accuracy(line):
    match = re.fullmatch(r"test accuracy ([01]\.\d{3})", line)
    assert match is not None, line
    return float(match[1])


def test_two_lines_are_changed_and_the_readme_shows_them(repo_root):
    changed = changed_lines(repo_root / "docs" / "examples")
    assert [line[0] for line in changed] == ["-", "+", "-", "+"]
    readme = [line.strip() for line in (repo_root / "README.md").read_text().splitlines()]
    assert [line for line in changed if line not in readme] == []


def test_the_plain_script_has_nothing_of_distbelief(repo_root, tmp_path):
    plain = repo_root / "docs" / "examples" / "plain.py"
    assert "distbelief" not in plain.read_text()
    assert accuracy(run([plain], tmp_path)[-1]) > 0.9


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(one, marks=[pytest.mark.long] if "huggingface" in one else [])
        for one in EXAMPLES
    ],
    indirect=True,
)
def test_an_example_learns_alone_and_leaves_no_files(example, tmp_path):
    assert accuracy(run([example], tmp_path)[-1]) > 0.9
    assert list(tmp_path.iterdir()) == []


def crews():
    """Each example under each engine; the quickest of them in every run of the tests."""
    for example in EXAMPLES:
        for engine in ("local", "ray"):
            marks = [pytest.mark.ray] if engine == "ray" else []
            if engine == "ray" or "script" not in example:
                marks.append(pytest.mark.long)
            yield pytest.param(example, engine, marks=marks, id=f"{example}-{engine}")


@pytest.mark.parametrize(("example", "engine"), list(crews()), indirect=["example"])
@pytest.mark.integration
def test_an_example_learns_by_four_workers(example, engine, tmp_path):
    launch = ["-m", "distbelief", "launch", example, "--engine", engine, "--workers", 4, "--json"]
    runs, saved = tmp_path / "runs", tmp_path / "saved"
    save = ["--save", saved] if example.stem in NEEDS else []
    lines = run([*launch, "--run-dir", runs, "--", "--epochs", EPOCHS, *save], tmp_path)
    result = json.loads(lines[-1])
    assert (result["exit"], result["error"], result["engine"]) == ("done", None, engine)
    assert result["samples"] == EPOCHS * SAMPLES  # together, every sample once an epoch
    assert len(result["worker_samples"]) >= 2  # one may come when all is done
    for index in range(4):  # each evaluates the parameters that it saw last
        words = (runs / result["run"] / "logs" / f"w{index}.out").read_text().splitlines()
        assert accuracy(words[-1]) > 0.9
    # Only the first worker writes files, and only where it was told to.
    assert {path.name for path in tmp_path.iterdir()} == {"runs", *(["saved"] if save else [])}
