"""Memory between processes of one host: who may map it, what is refused, and that nothing is left.

The other process is plain Python without our code, which makes the file byte by byte: so the
tests hold the format too.
"""

import mmap
import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.memory import HEADER, Memory, MemoryRefused, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="no shared memory here")

MAKE = """
import fcntl, os, sys
kind, owner, size, seals = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if kind == "memory":
    fd = os.memfd_create("distbelief-" + owner, os.MFD_ALLOW_SEALING)
elif kind == "pipe":
    fd = os.pipe()[0]
else:
    fd = os.open(kind, os.O_RDWR | os.O_CREAT)
nonce = bytes(range(32))
if kind != "pipe":
    os.ftruncate(fd, 4096 + size)
    os.pwrite(fd, nonce, 0)
    os.pwrite(fd, b"content", 4096)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
print(f"{os.getpid()}:{fd}:{size}:{nonce.hex()}", flush=True)
for line in sys.stdin:
    os.pwrite(fd, line.encode(), 4096)
    print(flush=True)
"""
SHRINK, GROW = 2, 4


@contextmanager
def other(kind="memory", owner="worker", size=8192, seals=SHRINK):
    """(process, address): a process that has made something, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", MAKE, kind, owner, str(size), str(seals)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.communicate()


@contextmanager
def mine(size=8192):
    memory = Memory.create("shard", size)
    try:
        yield memory
    finally:
        memory.close()


def changed(address, at, word):
    words = address.split(":")
    words[at] = str(word)
    return ":".join(words)


def refusal(address, owner="worker"):
    with pytest.raises(MemoryRefused) as error:
        Memory.open(address, owner)
    return str(error.value)


def test_one_sees_what_the_other_writes():
    with other() as (process, address):
        memory = Memory.open(address, "worker")
        assert (memory.size, memory.address) == (8192, address)
        assert repr(memory) == f"<Memory of pid {process.pid} [8192 bytes]>"
        content = memory.array()
        assert len(content) == 8192
        assert content[:7].tobytes() == b"content"
        process.stdin.write("changed\n")
        process.stdin.flush()
        process.stdout.readline()
        assert content[:7].tobytes() == b"changed"
        del content
        memory.close()


def test_another_process_opens_ours_where_its_address_says():
    with mine() as memory:
        memory.vector(4, 3).copy_(torch.tensor([1.0, 2.0, 3.0]))
        pid, fd, size, nonce = memory.address.split(":")
        code = (
            f"f = open('/proc/{pid}/fd/{fd}', 'rb'); d = f.read();"
            f"print(len(d) - 4096 == {size}, d[:32].hex() == '{nonce}',"
            "any(d[32:4096]), d[4096:4112].hex())"
        )
        out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
        assert out.stdout.split() == ["True", "True", "False", "000000000000803f0000004000004040"]


def test_the_process_that_made_it_may_open_it_too():
    with mine() as memory:
        vector = memory.vector(0, 2048)
        assert not vector.any(), "it begins at 0"
        again = Memory.open(memory.address, "shard")
        vector.fill_(7.0)
        assert again.vector(4096, 1024).eq(7.0).all()
        assert again.is_owner_alive
        again.close()


def test_an_owner_that_ends_is_seen_and_its_content_stays():
    with other() as (process, address):
        memory = Memory.open(address, "worker")
        was_alive = memory.is_owner_alive
        process.kill()
        process.wait()
        assert (was_alive, memory.is_owner_alive) == (True, False)
        assert memory.array()[:7].tobytes() == b"content"
        memory.close()


def test_a_killed_owner_is_seen_before_anybody_has_waited_for_it():
    with other() as (process, address):
        memory = Memory.open(address, "worker")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert not memory.is_owner_alive
        memory.close()


# What is refused


def test_a_process_that_is_gone_is_refused():
    with other() as (_, address):
        pass
    assert "no process" in refusal(address)


def test_a_pid_that_is_another_process_now_is_refused():
    with other() as (_, address):
        nonce = address.rpartition(":")[2]
        assert "nonce differs" in refusal(changed(address, 3, nonce[::-1]))
        assert "nonce differs" in refusal(changed(address, 3, "0" * 64))


def test_memory_of_another_kind_of_owner_is_refused():
    with other() as (_, address):
        assert "not a memory file of a shard" in refusal(address, "shard")


@pytest.mark.parametrize("size", [0, 8191, 8193, 8192 + HEADER, 10**14])
def test_an_address_of_another_size_is_refused(size):
    with other() as (_, address):
        assert "has not the" in refusal(changed(address, 2, size))


@pytest.mark.parametrize("seals", [0, GROW])
def test_memory_that_could_shrink_is_refused(seals):
    with other(seals=seals) as (_, address):
        assert "may shrink" in refusal(address)


def test_a_pipe_is_refused_without_waiting_for_its_other_end():
    with other("pipe") as (_, address):
        assert "not a memory file" in refusal(address)


def test_an_ordinary_file_is_refused(tmp_path):
    with other(str(tmp_path / "distbelief-worker"), seals=0) as (_, address):
        assert "not a memory file" in refusal(address)


def test_a_number_where_nothing_is_open_is_refused():
    with other() as (_, address):
        assert "No such file" in refusal(changed(address, 1, 999))


NONCE = "0" * 64


@pytest.mark.parametrize(
    "address",
    [
        "",
        f"0:0:0:{NONCE}",
        f"999999999:3:8192:{NONCE}",
        f"9999999999:3:8192:{NONCE}",  # no C int: must not be an OverflowError
        f"-1:3:8192:{NONCE}",
        f"PID:9999999999:8192:{NONCE}",
        f"PID:3:{'9' * 15}:{NONCE}",
        f"PID:../../1/fd/3:8192:{NONCE}",
        f"1\n:3:8192:{NONCE}",
        f"\u0663:3:8192:{NONCE}",  # a digit, but not of ours
        f"1:3:8192:{NONCE}\n",
        f"1:3:8192:{NONCE[1:]}",
    ],
)
def test_an_address_that_is_none_is_refused(address):
    address = address.replace("PID", str(os.getpid()))  # names of tests are always the same
    refusal(address)


@given(
    st.one_of(
        st.text(max_size=100),
        st.builds(
            "{}:{}:{}:{}".format,
            st.one_of(st.just(os.getpid()), st.integers(-1, 10**11)),
            st.integers(-1, 10**11),
            st.integers(-1, 10**17),
            st.text("0123456789abcdef", min_size=64, max_size=64),
        ),
    )
)
def test_any_text_is_refused(text):
    refusal(text)


@pytest.mark.parametrize(
    ("where", "name"),
    [(platform, "machine"), (os, "memfd_create"), (os, "pidfd_open")],
)
def test_a_machine_without_it_has_none(monkeypatch, where, name):
    if where is platform:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    else:
        monkeypatch.delattr(where, name)
    assert not is_supported()
    assert "not an address" in refusal(f"{os.getpid()}:3:8192:{NONCE}")


# What may be done with it


def test_the_file_can_neither_shrink_nor_grow():
    with mine() as memory:
        fd = int(memory.address.split(":")[1])
        for size in (0, HEADER, HEADER + 8191, HEADER + 8193):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert os.fstat(fd).st_size == HEADER + 8192


def test_the_descriptor_is_not_inherited_by_programs_that_are_started():
    with mine() as memory:
        assert not os.get_inheritable(int(memory.address.split(":")[1]))


def test_what_was_opened_is_mapped_to_read_only():
    with mine() as memory:
        again = Memory.open(memory.address, "shard")
        assert again._mapped is not None
        with pytest.raises(TypeError, match=r"read-only|readonly"):
            again._mapped[0:1] = b"x"
        with open("/proc/self/maps") as file:
            rights = [line.split()[1] for line in file if "memfd:distbelief-shard" in line]
        assert sorted(rights) == ["r--s", "rw-s"]
        again.close()


def test_a_page_takes_no_memory_until_it_is_touched():
    with mine(2**30) as memory:
        fd = int(memory.address.split(":")[1])
        assert os.fstat(fd).st_blocks * 512 <= 2 * mmap.PAGESIZE


@pytest.mark.parametrize(
    ("offset", "numel"), [(-4, 1), (2, 1), (0, 2049), (8192, 1), (8188, 2), (0, -1), (4 * 2**40, 1)]
)
def test_a_vector_must_lie_inside(offset, numel):
    with mine() as memory, pytest.raises(ValueError, match="of 8192"):
        memory.vector(offset, numel)


def test_a_vector_may_reach_the_very_end():
    with mine() as memory:
        memory.vector(8188, 1).fill_(1.0)
        assert memory.array()[-4:].tobytes() == b"\0\0\x80\x3f"


# Letting go


def maps():
    with open("/proc/self/maps") as file:
        return sum("memfd:distbelief" in line for line in file)


def test_it_may_be_closed_twice_and_closes_nobody_elses_descriptor():
    memory = Memory.create("shard", 100)
    again = Memory.open(memory.address, "shard")
    assert maps() == 2
    for one in (memory, again):
        one.close()
    taken = [os.dup(0) for _ in range(4)]  # takes the numbers that were given back
    for one in (memory, again):
        one.close()
    assert maps() == 0
    for fd in taken:
        os.close(fd)  # OSError if it was closed behind our back


def test_a_vector_of_ones_own_stays_usable_after_close():
    memory = Memory.create("worker", 4096)
    vector = memory.vector(0, 1024)
    memory.close()
    vector.fill_(3.0)
    assert float(vector.sum()) == 3072.0
    assert maps() == 1
    del vector
    assert maps() == 0


def test_nothing_opens_after_close():
    memory = Memory.create("worker", 4096)
    memory.close()
    refusal(memory.address)


def test_a_refused_address_leaves_nothing_mapped():
    with mine() as memory:
        for _ in range(20):
            refusal(changed(memory.address, 3, NONCE), "shard")
            refusal(changed(memory.address, 2, 8191), "shard")
        assert maps() == 1
