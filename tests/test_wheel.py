"""What a user installs: a wheel built from the sdist of a clean copy, run from another folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parent.parent
MAPPING = {
    "distbelief": "distbelief",
    "distbelief/bench": "distbelief/bench",
    "distbelief/chaos": "distbelief/chaos",
    "distbelief/cluster": "distbelief/cluster",
    "distbelief/commands": "distbelief/commands",
    "distbelief/controller": "distbelief/controller",
    "distbelief/monitor": "distbelief/monitor",
    "distbelief/simulation": "distbelief/simulation",
    "distbelief/model": "model",
    "distbelief/workers": "workers",
    "distbelief/param_server": "param_server",
}


def run(*command: str | Path, cwd: Path, pythonpath: Path | None = None, timeout: float = 120):
    """Run to the end; fail with everything it said. The repository is not on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    finished = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist and wheel of the files git knows or would add, and of nothing that only lies about."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: a clean copy can not be told from what lies about")
    copy = tmp_path_factory.mktemp("copy")
    listed = run(*("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.exists():  # git still lists what was just deleted
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    # Without isolation it builds with the setuptools at hand and downloads nothing. The wheel
    # is made from the unpacked sdist, where the links are gone: only the mapping is left.
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--target", target, wheel),
        cwd=target,
    )
    return target


def test_a_wheel_holds_every_module_once_with_its_content(wheel: Path):
    wanted = {
        f"{package}/{path.name}": path.read_bytes()
        for package, folder in MAPPING.items()
        for path in (ROOT / folder).glob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [entry.filename for entry in archive.infolist() if entry.filename.endswith(".py")]
        assert sorted(names) == sorted(wanted)
        assert {name: archive.read(name) for name in names} == wanted


def test_a_wheel_holds_its_data_and_no_links(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {entry.filename for entry in archive.infolist()}
        is_link = [entry.external_attr >> 28 == 0o12 for entry in archive.infolist()]
        licences = [name for name in names if name.endswith("/LICENSE")]
    assert not any(is_link)
    assert "distbelief/py.typed" in names
    assert len(licences) == 1
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"distbelief"}


def test_an_installed_wheel_imports_from_another_folder(installed: Path, tmp_path: Path):
    # The modules have to come from the wheel: an editable install stands ready to help out.
    names = ["distbelief.param_server.layout", "distbelief.workers", "distbelief.model.googlenet"]
    program = (
        "import importlib, json; "
        f"print(json.dumps([importlib.import_module(n).__file__ for n in {names!r}]))"
    )
    files = json.loads(run(sys.executable, "-c", program, cwd=tmp_path, pythonpath=installed))
    assert [Path(file).is_relative_to(installed) for file in files] == [True] * len(names), files


def test_an_installed_wheel_knows_its_version(installed: Path, wheel: Path, tmp_path: Path):
    said = run(
        *(sys.executable, "-m", "distbelief", "--version"), cwd=tmp_path, pythonpath=installed
    )
    assert wheel.name.split("-")[1] in said


def test_a_wheel_trains_on_digits_from_another_folder(installed: Path, tmp_path: Path):
    said = run(
        *(sys.executable, "-m", "distbelief", "launch", "--engine", "local"),
        *("--workers", "2", "--shards", "2", "--data", "digits", "--width", "0.25"),
        *("--until", "2-epochs", "--json", "--run-dir", str(tmp_path / "run")),
        cwd=tmp_path,
        pythonpath=installed,
    )
    result = json.loads(said.strip().splitlines()[-1])
    assert result["type"] == "result"
    assert result["exit"] == "done"
