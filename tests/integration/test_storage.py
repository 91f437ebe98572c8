"""Disks that are full, read-only or fill up, and ports that are taken: said, and nothing lost.

The disks are small file systems in a namespace of the test's own.
"""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distbelief.launcher import launch
from tests.helpers.runs import Watch, tiny_job


def on_disk(folder: Path, options: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Launch the tiny model with its runs on a file system of its own, mounted with `options`."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here: a full disk cannot be made")
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"namespaces are not allowed here: {allowed.stderr.decode().strip()}")
    disk = folder / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "distbelief", "launch", "--model", "tiny:Net", "--engine"]
    command += ["local", "--until", "1-epochs", "--run-dir", str(disk), "--set", "train.lr=0.1"]
    script = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "mount", options, str(disk), *command, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("size=4k", "MiB free, the run saves up to"),
        ("size=64k,ro", "Read-only file system"),
    ],
)
def test_a_disk_that_takes_nothing_is_said_before_anything_is_started(
    user_folder: Path, options: str, text: str
):
    ended = on_disk(user_folder, options)
    assert ended.returncode == 5
    assert "error[DB-STORE-002]" in ended.stderr
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "starting" not in ended.stdout + ended.stderr


def test_a_disk_that_fills_up_in_a_run_is_said_and_ends_with_the_storage_code(user_folder: Path):
    # The model's module fills the disk when it is imported in a worker, after the start.
    text = (user_folder / "tiny.py").read_text()
    fill = (
        "\nimport os, sys\n"
        "if sys.argv[0].endswith(('process.py', 'zygote.py')):\n"
        "    try:\n"
        "        with open('disk/filler', 'wb', buffering=0) as file:\n"
        "            while file.write(bytes(4096)):\n"
        "                pass\n"
        "    except OSError:\n"
        "        pass\n"
    )
    (user_folder / "tiny.py").write_text(text + fill)
    ended = on_disk(user_folder, "size=3m", "--json")
    assert ended.returncode == 5
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["exit"] == "storage"
    assert result["error"]["code"].startswith("DB-STORE")
    assert result["samples"] == 1437  # training went on to its end
    assert "Traceback" not in ended.stderr


def test_a_folder_that_cannot_be_made_is_said(user_folder: Path):
    (user_folder / "runs").write_text("a file, not a folder")
    command = [sys.executable, "-m", "distbelief", "launch", "--model", "tiny:Net", "--engine"]
    ended = subprocess.run(
        [*command, "local"], cwd=user_folder, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 5
    assert "error[DB-STORE-002]: the run folder runs/" in ended.stderr
    assert (user_folder / "runs").read_text() == "a file, not a folder"


@pytest.mark.parametrize("place", [0, 2])
def test_a_port_in_use_is_named(user_folder: Path, place: int):
    """place: the controller's port, or that of the second shard."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        job = tiny_job(user_folder / "runs", **{"net.port": port - place})
        result = launch(job, live=Watch())
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-ENV-005"
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in result.error["text"]
    assert "net.port" in result.error["text"]
