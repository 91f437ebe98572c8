"""What the kernel counts, read from /proc."""

import os
import subprocess
import sys
import time

import pytest

from distbelief.bench.machine import Resident, Use, busy, descendants, resident, resident_of, use_of
from distbelief.bench.region import Region

SMAPS = """\
55d0c0000000-55d0c0200000 r--p 00000000 08:01 123 /usr/bin/python3.11
Rss:                1000 kB
Pss:                 500 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:                2000 kB
7f0020000000-7f0030000000 rw-s 00000000 00:01 77 /memfd:distbelief-shard (deleted)
Rss:                4000 kB
7f0040000000-7f0050000000 r--s 00000000 00:01 78 /memfd:distbelief-worker (deleted)
Rss:                8000 kB
7f0060000000-7f0070000000 rw-s 00000000 00:19 79 /dev/shm/plasmaXyz (deleted)
Rss:               16000 kB
VmFlags: rd wr sh
"""


def test_workers_gradients_that_a_server_maps_are_not_its_own_memory():
    found = resident_of(SMAPS.splitlines())
    assert found.own_mb == pytest.approx(7000 * 1024 / 1e6)
    assert found.mapped_mb == pytest.approx(24000 * 1024 / 1e6)


def test_memory_of_servers_adds_up():
    assert Resident(1.0, 2.0) + Resident(10.0, 20.0) == Resident(11.0, 22.0)


def test_a_process_that_is_gone_has_no_memory_and_has_used_nothing():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert resident(done.pid) == Resident(0.0, 0.0)
    assert use_of([done.pid]) == Use(0.0, 0)


@pytest.mark.parametrize(("owner", "is_own"), [("shard", True), ("worker", False)])
def test_touched_pages_of_a_region_are_counted_by_their_owner(owner, is_own):
    mb = 64
    before = resident(os.getpid())
    region = Region.create(owner, mb * 10**6 // 4)
    region.values[:] = 1
    after = resident(os.getpid())
    os.close(int(region.path.rpartition("/")[2]))
    grown = after.own_mb - before.own_mb if is_own else after.mapped_mb - before.mapped_mb
    assert grown == pytest.approx(mb, abs=8)


def test_a_region_is_the_same_memory_for_whoever_opens_it():
    made = Region.create("worker", 1000)
    opened = Region.open(made.path, 1000)
    made.values[7] = 3.5
    assert opened.values[7] == 3.5
    os.close(int(made.path.rpartition("/")[2]))


def test_what_a_process_and_its_children_use_is_counted():
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', '''\n"
        "import time\nend = time.process_time() + 0.2\n"
        "while time.process_time() < end: pass\n"
        "print(flush=True)\ninput()'''], stdin=subprocess.PIPE)\n"
        "input()\nchild.communicate(b'x')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    try:
        parent.stdout.readline()
        used = use_of([parent.pid])
        assert len(descendants(parent.pid)) == 1
    finally:
        parent.communicate(b"x\n", timeout=10)
    assert used.cpu_s >= 0.19
    assert used.faults > 100


def test_the_machine_has_been_busy():
    first = busy()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    last = busy()
    assert last.cpu_s > first.cpu_s
    assert last.stolen_s >= first.stolen_s
