"""What all tests share: markers by folder, the leak check, seeds, and where real data lies."""

import os
import random
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import numpy
import pytest
import torch

from tests.helpers import leaks
from tests.helpers.leaks import no_leaks, pytest_runtest_makereport
from tests.helpers.runs import TINY

__all__ = ["no_leaks", "pytest_runtest_makereport"]  # pytest finds a fixture and a hook by name

ROOT = Path(__file__).resolve().parent.parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SEED = 20121203

MARKED_FOLDERS = ("integration", "chaos", "ray", "browser", "cluster")
MARKED_TIMEOUT_S = 300
TOGETHER = {"ray": "ray", "cluster": "cluster", "browser": "{file}", "test_wheel.py": "wheel"}
"""By folder or file: what runs in one of pytest-xdist's processes, as what it shares takes long to
make, or there is one of it."""

leaks.track_zmq()

# A shell without job control has what it starts with & ignore Ctrl-C, and so would the processes of
# the tests, to which some send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A run has a monitor in the tests that are about it, and nowhere else: each takes half a second.
os.environ["DISTBELIEF_MONITOR__ON"] = "false"

# A deadline per example measures how busy the machine is; the timeout per test stays.
# In CI the examples are the same each time, so that a red run means a change.
hypothesis.settings.register_profile(
    "house", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("house")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder, give these tests more time, and skip what needs a GPU where there is none."""
    has_gpu: bool | None = None
    for item in items:
        folder = item.path.relative_to(ROOT).parts[1]
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(MARKED_TIMEOUT_S))
        if folder in TOGETHER:
            group = TOGETHER[folder].format(file=item.path.stem)
            item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("long") is not None and "DISTBELIEF_TEST_LONG" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="takes long: make test-long"))
        if item.get_closest_marker("gpu") is not None:
            has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:  # Any: what pytest makes of it
    """What pytest-xdist sends has to be UTF-8; tests log file names that are not."""
    return _as_utf8((yield))


def _as_utf8(data: Any) -> Any:  # Any: what a report is made of
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, dict):
        return {_as_utf8(key): _as_utf8(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)([_as_utf8(one) for one in data])
    return data


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Sums come out in one order, and several test processes do not fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever tests ran before it."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a module of theirs, tiny.py; the current one."""
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTBELIEF_WARM_WORKERS", "true")  # as in tiny_job, for the command line
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny", None)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data and oracles: DISTBELIEF_TEST_DATA, else ../shared/data."""
    named = os.environ.get("DISTBELIEF_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        source = "DISTBELIEF_TEST_DATA" if named else "beside the repository"
        _without_data(f"no test data: {source}: {folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """Fashion-MNIST as the Debian package dataset-fashion-mnist installs it."""
    if not (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        _without_data(f"no Fashion-MNIST in {FASHION_MNIST}: apt-get install dataset-fashion-mnist")
    return FASHION_MNIST


def _without_data(reason: str) -> NoReturn:
    """Skip at home; in CI, where the data has to be there, fail."""
    if os.environ.get("DISTBELIEF_REQUIRE_DATA") == "1":
        pytest.fail(f"DISTBELIEF_REQUIRE_DATA=1, but {reason}", pytrace=False)
    pytest.skip(reason)
