"""Environment: old and missing libraries are named before their own words are heard."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError

import pytest

from distbelief.environment import OLDEST, PYTHON_MIN, check_environment, numbers
from distbelief.problem import Problem


def test_what_is_here_will_do():
    check_environment(engine="local")


def test_the_oldest_are_those_of_the_package(repo_root):
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    needed = dict(line.split(">=") for line in project["dependencies"])
    assert {name: numbers(needed[name]) for name in OLDEST} == OLDEST
    assert numbers(project["requires-python"].removeprefix(">=")) == PYTHON_MIN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("2.6.0a0+git12", (2, 6, 0)),
        ("27.0.0rc1", (27, 0, 0)),
        ("26", (26,)),
        ("unknown", ()),
    ],
)
def test_the_numbers_of_a_version(text, expected):
    assert numbers(text) == expected


def installed(folder, name: str, version: str) -> None:
    """Make a package of that version be found first."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(folder, engine: str) -> str:
    """What is said in a process that finds packages in a folder first; empty if nothing."""
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from distbelief.environment import check_environment
from distbelief.problem import Problem
try:
    check_environment(engine={engine!r})
except Problem as problem:
    print(problem.code, problem)
assert "torch" not in sys.modules and "ray" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_old_libraries_are_named_with_what_is_needed(tmp_path):
    assert check(tmp_path, "ray") == ""
    installed(tmp_path, "ray", "2.9.3")
    assert check(tmp_path, "local") == ""  # Ray is not looked at
    said = check(tmp_path, "ray")
    assert said.startswith("DB-ENV-004")
    assert "ray 2.9.3 is installed, distbelief needs 2.40 or newer" in said
    assert "pip install 'ray>=2.40', or use --engine local" in said
    installed(tmp_path, "torch", "2.5.1+cu121")
    said = check(tmp_path, "local")
    assert "torch 2.5.1+cu121 is installed, distbelief needs 2.6 or newer" in said
    assert "pip install 'torch>=2.6'" in said
    assert "--engine" not in said


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("ray", "DB-ENV-001", "Ray is not installed"),
        ("torch", "DB-ENV-004", "torch is not installed"),
    ],
)
def test_libraries_that_are_not_there_are_named(monkeypatch, name, code, text):
    monkeypatch.setattr("distbelief.environment.OLDEST", {name: (1,)})

    def version(asked):
        raise PackageNotFoundError(asked)

    monkeypatch.setattr("distbelief.environment.version", version)
    with pytest.raises(Problem, match=text) as problem:
        check_environment(engine="ray")
    assert problem.value.code == code


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr("distbelief.environment.PYTHON_MIN", (9, 9))
    with pytest.raises(Problem, match=r"this is Python 3\.\d+, distbelief needs 9\.9 or newer"):
        check_environment(engine="local")


def test_the_command_says_so_before_torch_is_imported(tmp_path):
    installed(tmp_path, "torch", "1.13.1")
    ended = subprocess.run(
        [sys.executable, "-m", "distbelief", "launch", "--engine", "local"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 3
    assert "error[DB-ENV-004]: torch 1.13.1 is installed" in ended.stderr
    assert "Traceback" not in ended.stderr
