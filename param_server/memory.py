"""Memory: an anonymous memory file that two processes of one host map; it has no name to leak.

One process makes it and tells its address, the other opens that through /proc/PID/fd. The kernel
frees it when the last of the two is gone, however it went: nothing is left after kill -9. The
file cannot shrink (a seal), so neither side can make the other crash by cutting it off.

    file     = nonce[32] zeros[4064] content      content begins at a page
    address  = "pid:fd:size:nonce in hex"         nonce: a pid may be used again by another process

Opening works only between processes of one user that see each other's pids: so an address that
opens and has its nonce proves that both are on one host, and nothing else need be compared.
Across containers without a common pid namespace it does not open, and TCP is used.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import re
import secrets
import select
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HEADER = 4096
"""Bytes before the content: a page."""
NONCE = 32
# Nine digits: more are no pid, and os.pidfd_open raises OverflowError there.
_ADDRESS = re.compile(r"([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,15}):([0-9a-f]{64})")
_NAME = "distbelief-"


class MemoryRefused(Exception):
    """An address does not open here; the text says why. The caller goes on without."""


def is_supported() -> bool:
    """Linux on x86-64: memory files, and stores that every core sees in their order.

    The sequence numbers of slab.py rest on that order; elsewhere they would need barriers, which
    Python cannot make. Some builds of Python for Linux (against old headers) lack the calls.
    """
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "AMD64")
        and all(hasattr(os, name) for name in ("memfd_create", "pidfd_open"))
        and hasattr(fcntl, "F_ADD_SEALS")
    )


class Memory:
    """A mapped memory file. Close it; of one's own, the last view of it unmaps it."""

    def __init__(self, mapped: mmap.mmap, size: int, address: str, *, is_writable: bool) -> None:
        """Use `create` or `open`."""
        self.size = size
        """Bytes of content."""
        self.address = address
        self._mapped: mmap.mmap | None = mapped
        self._is_writable = is_writable
        self._fd = -1
        self._pidfd = -1

    def __repr__(self) -> str:
        pid = self.address.partition(":")[0]
        return f"<Memory of pid {pid} [{self.size} bytes]>"

    @classmethod
    def create(cls, owner: str, size: int) -> "Memory":
        """A file of `size` bytes, all zero; a page takes memory once it has been touched.

        owner: `shard` or `worker`, seen in /proc/PID/maps as memfd:distbelief-<owner>.
        Raises: OSError where the kernel has none of it.
        """
        assert sys.platform == "linux"
        fd = os.memfd_create(_NAME + owner, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, HEADER + size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            mapped = mmap.mmap(fd, HEADER + size)
        except BaseException:
            os.close(fd)
            raise
        nonce = secrets.token_bytes(NONCE)
        mapped[:NONCE] = nonce
        self = cls(mapped, size, f"{os.getpid()}:{fd}:{size}:{nonce.hex()}", is_writable=True)
        self._fd = fd
        return self

    @classmethod
    def open(cls, address: str, owner: str) -> "Memory":
        """Map another process's file, to read only.

        Raises: MemoryRefused: another host, another user, a process that is gone, or no address.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None or not is_supported():
            raise MemoryRefused(f"not an address of shared memory: {address[:80]!r}")
        pid, number, size = int(match[1]), int(match[2]), int(match[3])
        path = Path(f"/proc/{pid}/fd/{number}")
        try:
            pidfd = os.pidfd_open(pid)  # before anything is read, so that it is of this process
        except OSError as error:
            raise MemoryRefused(f"no process {pid} here: {error.strerror}") from error
        try:
            mapped = cls._map(path, size, bytes.fromhex(match[4]), owner)
        except OSError as error:
            os.close(pidfd)
            raise MemoryRefused(f"{path}: {error.strerror}") from error
        except BaseException:
            os.close(pidfd)
            raise
        self = cls(mapped, size, address, is_writable=False)
        self._pidfd = pidfd
        return self

    @staticmethod
    def _map(path: Path, size: int, nonce: bytes, owner: str) -> mmap.mmap:
        # Looked at before it is opened: opening a pipe would wait for its other end. Not waiting
        # too, because the number may be given to something else between the two.
        if not str(path.readlink()).startswith(f"/memfd:{_NAME}{owner}"):
            raise MemoryRefused(f"{path} is not a memory file of a {owner}")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.fstat(fd).st_size != HEADER + size:
                raise MemoryRefused(f"{path} has not the {HEADER + size} bytes of its address")
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise MemoryRefused(f"{path} may shrink under its reader")
            mapped = mmap.mmap(fd, HEADER + size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        if mapped[:NONCE] != nonce:
            mapped.close()
            raise MemoryRefused(f"{path} is another process's: its nonce differs")
        return mapped

    @property
    def is_owner_alive(self) -> bool:
        """The process that made it still runs. Of an opened one."""
        assert self._pidfd >= 0, "asked of one's own memory"
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def array(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """The content as bytes. One that was opened must not be written: that would crash.

        It keeps the memory mapped only in the process that made it; of an opened one the Memory
        has to be kept as long as anything of it is used.
        """
        assert self._mapped is not None, "closed"
        whole = np.frombuffer(self._mapped, np.uint8)
        if not self._is_writable:
            # Marked writable, which torch asks for (it warns of other memory at each use).
            pointer = (ctypes.c_uint8 * len(whole)).from_address(whole.ctypes.data)
            whole = np.ctypeslib.as_array(pointer)
        return whole[HEADER:]

    def vector(self, offset: int, numel: int) -> Tensor:
        """float32 [numel] at a byte offset of the content; see `array` for who keeps it.

        Raises: ValueError where it does not lie inside, or not at a multiple of 4.
        """
        if offset < 0 or offset % 4 or numel < 0 or offset + 4 * numel > self.size:
            raise ValueError(f"{numel} values at byte {offset} of {self.size}")
        return torch.from_numpy(self.array()[offset : offset + 4 * numel].view(np.float32))

    def close(self) -> None:
        """Let go of it; may be called twice. Views of one's own file stay usable."""
        for fd in (self._fd, self._pidfd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fd = self._pidfd = -1
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # views of it are left: the last one unmaps it
                mapped.close()


def without_memory(error: OSError) -> str:
    """Why there is no shared memory, in words."""
    if error.errno in (errno.ENOSYS, errno.EPERM):
        return "the kernel, or the container, has no memory files"
    return f"no shared memory: {error.strerror}"
