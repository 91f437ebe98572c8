"""Region: a vector in an anonymous memory file that several processes map.

Only for the floor that is written by hand (floor_memory.py); our own system has its own.
"""

import mmap
import os

import numpy as np

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


class Region:
    """float32 [numel], all zero at first; it lives as long as some process maps it."""

    def __init__(self, fd: int, numel: int) -> None:
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        """Where other processes of this user find it."""
        self.values: Vector = np.frombuffer(mmap.mmap(fd, 4 * numel), np.float32)

    @classmethod
    def create(cls, owner: str, numel: int) -> "Region":
        """owner: `shard` or `worker`; machine.py tells by it whose memory it is."""
        fd = os.memfd_create(f"distbelief-{owner}-floor")
        os.ftruncate(fd, 4 * numel)
        return cls(fd, numel)

    @classmethod
    def open(cls, path: str, numel: int) -> "Region":
        fd = os.open(path, os.O_RDWR)
        try:
            return cls(fd, numel)
        finally:
            os.close(fd)
