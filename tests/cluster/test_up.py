"""`distbelief cluster` over the real `ray up`: three hosts, from nothing to nothing."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distbelief.cluster.document import parse
from distbelief.cluster.remote import stop_all
from tests.cluster.hosts import Hosts, missing

UP_S = 180


@pytest.fixture
def hosts(tmp_path, repo_root):
    why = missing()
    if why is not None:
        pytest.skip(f"no hosts: {why}")
    env = {"PYTHONPATH": str(repo_root), "RAY_USAGE_STATS_ENABLED": "0"}
    with Hosts.up(3, tmp_path / "hosts", env, ["head", "ps-1", "gpu-1"]) as made:
        yield made


def file_of(hosts: Hosts, repo_root: Path, folder: Path) -> Path:
    """deploy/ray/onprem.yaml with these hosts, this key and nothing else changed."""
    text = (repo_root / "deploy/ray/onprem.yaml").read_text()
    for number in (1, 2, 3):
        text = text.replace(f"192.0.2.{number}", hosts[number].address)
    text = text.replace("ssh_user: ubuntu", "ssh_user: root")
    text = text.replace("~/.ssh/id_ed25519", str(hosts.key))
    path = folder / "onprem.yaml"
    path.write_text(text)
    return path


@pytest.mark.long
@pytest.mark.timeout(900)
def test_up_status_and_down_on_three_hosts(hosts, repo_root, tmp_path):
    file = file_of(hosts, repo_root, tmp_path)
    home, scratch = tmp_path / "home", tmp_path / "ray"
    for folder in (home, scratch):
        folder.mkdir()
    mine = {"HOME": str(home), "RAY_TMPDIR": str(scratch), "TMPDIR": str(scratch)}
    env = {**os.environ, **mine}  # or Ray's launcher leaves its state in the system's own folders

    def cluster(*args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distbelief", "cluster", args[0], str(file), *args[1:]],
            cwd=repo_root,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    refused = cluster("up")
    assert refused.returncode == 2
    assert "error[DB-CLUSTER-004]" in refused.stderr
    assert [hosts.processes(n) for n in hosts.hosts] == [{}, {}, {}]

    began = time.monotonic()
    up = cluster("up", "--yes")
    assert up.returncode == 0, up.stdout + up.stderr
    assert "3 machines" in up.stdout
    print(f"up {time.monotonic() - began:.0f} s")  # noqa: T201 - shown with -s, and in a failure
    token = home / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    copies = [hosts[n].home / ".ray/auth_token" for n in hosts.hosts]

    text = ""
    while not re.search(r"0\.0/1\.0 ps\n.*0\.0/1\.0 worker\n", text):
        assert time.monotonic() - began < UP_S, text
        time.sleep(2)
        status = cluster("status")
        assert status.returncode == 0, status.stderr
        text = status.stdout
    assert "3 local.cluster.node" in text
    print(f"all there {time.monotonic() - began:.0f} s")  # noqa: T201
    for copy in copies:
        assert copy.read_text() == token.read_text()
        assert copy.stat().st_mode & 0o777 == 0o600

    # Without the token Ray says nothing, on its own host too.
    ask = "ray list nodes --address 127.0.0.1:6379"
    without = cluster("ssh", "--", "env", "RAY_AUTH_MODE=disabled", "bash", "-c", ask)
    assert without.returncode != 0

    where = cluster("ssh", "--host", hosts[2].address, "--", "hostname")
    assert where.stdout == "ps-1\n"

    # The dashboard listens where only its own host comes in.
    assert not reached(hosts, 8265)

    down = cluster("down", "--yes")
    assert down.returncode == 0, down.stdout + down.stderr
    for number in hosts.hosts:
        assert f"{hosts[number].address}  no process of Ray is left" in down.stdout
    deadline = time.monotonic() + 15  # the launcher's own connections linger for ten seconds
    while any(hosts.processes(n) for n in hosts.hosts):
        assert time.monotonic() < deadline, [hosts.processes(n) for n in hosts.hosts]
        time.sleep(0.5)

    hosts.cut(3)  # what cannot be looked at is not said to be clean
    again = cluster("down", "--yes")
    assert again.returncode == 1
    assert "error[DB-CLUSTER-006]: something may be left on " in again.stderr
    assert f"{hosts[1].address}  no process of Ray is left" in again.stdout


def reached(hosts: Hosts, port: int) -> bool:
    program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    args = (sys.executable, "-c", program, hosts[1].address, str(port))
    return hosts.run(2, *args, capture_output=True, check=False).returncode == 0


def test_down_says_of_a_host_that_it_cannot_be_looked_at(hosts, repo_root, tmp_path):
    """Nothing was started, so that what is shown is the looking alone."""
    document, _ = parse(file_of(hosts, repo_root, tmp_path).read_text(), "onprem.yaml")
    hosts.cut(3)
    reports = {report.address: report for report in stop_all(document[0])}
    assert reports[hosts[1].address].is_clean
    assert reports[hosts[2].address].is_clean
    assert "timed out" in reports[hosts[3].address].error


def test_down_names_what_is_left(hosts, repo_root, tmp_path):
    """What `ray stop` does not end: here a process that has Ray's name and ignores its signal."""
    document, _ = parse(file_of(hosts, repo_root, tmp_path).read_text(), "onprem.yaml")
    hosts.run(2, "bash", "-c", f"mkdir -p {hosts[2].home}/bin", check=True)
    shadow = hosts[2].home / "bin/ray"
    shadow.write_text("#!/bin/sh\nexit 0\n")  # a Ray that does not stop anything
    shadow.chmod(0o755)
    with (hosts[2].home / ".bashrc").open("a") as file:
        file.write(f"export PATH={hosts[2].home}/bin:$PATH\n")
    told = ("bash", "-c", "echo began; exec -a ray::IDLE sleep 1000")
    with hosts.popen(2, *told, stdout=subprocess.PIPE, text=True) as idle:
        assert idle.stdout is not None
        assert idle.stdout.readline() == "began\n"
        reports = {report.address: report for report in stop_all(document[0])}
        assert [text.split()[1:] for text in reports[hosts[2].address].left] == [
            ["ray::IDLE", "1000"]
        ]
        assert "left: " in reports[hosts[2].address].text
        (pid,) = hosts.processes(2)
        os.kill(pid, 9)
