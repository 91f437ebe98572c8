"""`distbelief cluster` over the real `ray up`: three hosts, from nothing to nothing."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
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


def test_a_port_of_the_heads_loopback_is_brought_here(hosts, repo_root, tmp_path):
    file = file_of(hosts, repo_root, tmp_path)
    (tmp_path / "page").write_text("the head's")
    serve = ("python", "-m", "http.server", "8787", "--bind", "127.0.0.1", "--directory")
    assert not reached(hosts, 8787)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tunnel = [sys.executable, "-m", "distbelief", "cluster", "dashboard", str(file)]
    tunnel += ["--port", "8787", "--local-port", str(port)]
    with (
        hosts.popen(1, *serve, str(tmp_path), **quiet) as server,
        subprocess.Popen(tunnel, cwd=repo_root, stdout=subprocess.PIPE, text=True) as command,
    ):
        assert command.stdout is not None
        assert command.stdout.readline() == f"http://127.0.0.1:{port}/\n"
        assert asked(f"http://127.0.0.1:{port}/page") == "the head's"
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 130
        for pid in hosts.processes(1):
            os.kill(pid, signal.SIGTERM)
        server.wait(10)


def asked(url: str) -> str:
    """What is there, as soon as something answers."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.2)
