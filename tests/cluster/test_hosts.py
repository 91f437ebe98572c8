"""The hosts that other tests of this folder stand on are hosts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, HostsError

REACH = "import socket, sys; socket.create_connection((sys.argv[1], 22), timeout=1).close()"
RECEIVE = """
import socket
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    with server.accept()[0] as connection:
        while connection.recv(1 << 20):
            pass
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
print(time.monotonic() - began)
"""


def reaches(hosts: Hosts, a: int, b: int) -> bool:
    args = (sys.executable, "-c", REACH, hosts[b].address)
    return hosts.run(a, *args, capture_output=True, check=False).returncode == 0


def seconds(hosts: Hosts, size: int) -> float:
    """That so many bytes take from host 1 to host 2."""
    with hosts.popen(2, sys.executable, "-c", RECEIVE, stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout is not None
        assert sink.stdout.readline() == "ready\n"
        args = (sys.executable, "-c", SEND, hosts[2].address, str(size))
        return float(hosts.run(1, *args, capture_output=True, text=True, check=True).stdout)


def test_a_host_has_a_name_a_home_and_processes_of_its_own(make_hosts):
    hosts = make_hosts(2)
    script = "hostname; echo $HOME; echo $$; ls /dev/shm | wc -l"
    out = hosts.run(2, "bash", "-c", script, capture_output=True, text=True, check=True).stdout
    name, home, pid, shared = out.split()
    assert (name, home, shared) == ("h2", str(hosts[2].home), "0")
    assert int(pid) < 100
    by_ssh = subprocess.run(
        hosts.ssh(2, "hostname; echo $HOME; command -v python"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert by_ssh.stdout.split() == ["h2", home, f"{Path(sys.executable).parent}/python"]


def test_a_cut_host_is_reached_by_nobody_until_it_is_healed(make_hosts):
    hosts = make_hosts(3)
    assert reaches(hosts, 1, 2)
    hosts.cut(2)
    assert not reaches(hosts, 1, 2)
    assert not reaches(hosts, 2, 3)
    assert reaches(hosts, 1, 3)
    hosts.heal(2)
    deadline = time.monotonic() + 10
    while not reaches(hosts, 1, 2):
        assert time.monotonic() < deadline


def test_a_rate_holds_until_it_is_taken_off(make_hosts):
    hosts = make_hosts(2)
    hosts.rate(2, 100)
    assert 0.7 < seconds(hosts, 10_000_000) < 3  # 0.8 s, less what the bucket lets through at once
    hosts.rate(2, 0)
    assert seconds(hosts, 10_000_000) < 0.5


def test_down_leaves_no_process_and_no_interface(make_hosts):
    hosts = make_hosts(2)
    told = ("sh", "-c", "echo began; exec sleep 1000")
    sleeper = hosts.popen(1, *told, stdout=subprocess.PIPE, text=True)
    assert sleeper.stdout is not None
    assert sleeper.stdout.readline() == "began\n"
    (inside,) = hosts.processes(1)
    inits = [hosts[1].pid, hosts[2].pid]
    found = Hosts.find(hosts.folder)  # as the command line does: another object
    found.down()
    sleeper.communicate(timeout=10)
    hosts.down()  # again, as the process that made them: it reaps what it had started
    assert not [pid for pid in (inside, *inits) if os.path.exists(f"/proc/{pid}")]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert f"dbh{hosts.net}" not in links
    assert not hosts.folder.exists()
    with pytest.raises(HostsError, match="no hosts"):
        Hosts.find(hosts.folder)


def test_sets_that_are_made_at_once_do_not_meet(tmp_path, make_hosts):
    first = make_hosts(1)  # skips where there can be none
    script = Path(__file__).with_name("hosts.py")
    folders = [tmp_path / name for name in "abc"]
    commands = [[sys.executable, str(script), "--folder", str(folder)] for folder in folders]
    started = [
        subprocess.Popen([*one, "up", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for one in commands
    ]
    assert [process.communicate(timeout=60)[1] for process in started] == [b"", b"", b""]
    nets = {Hosts.find(folder).net for folder in folders}
    for one in commands:
        subprocess.run([*one, "down"], check=True, timeout=60)
    assert len(nets | {first.net}) == 4
    assert first.run(1, "true", check=False).returncode == 0
