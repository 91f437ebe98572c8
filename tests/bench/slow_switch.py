"""Slow switch: a link between hosts of network namespaces that keeps every frame for a while.

The kernel here has no netem. So each host gets a tap device, and a process of this file carries the
frames between them: it reads one, and writes it to the other side when its time has come. Its rate
is bounded too, in each direction. Addresses are 10.78.0.N; nothing else is reached over it.
"""

import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
DEVICE = "slow0"
MTU = 9000
FRAMES = 64
"""Read at once."""
QUEUE_S = 0.05
"""Longer than that no frame waits for its turn: it is dropped, as by a switch."""


@contextmanager
def slow_link(pids: Mapping[int, int], delay_ms: float, mbit: int) -> Iterator[dict[int, str]]:
    """Between hosts by their first processes. Gives: the address of each on it."""
    spec = {"pids": list(pids.values()), "delay_s": delay_ms / 1000, "bytes_per_s": mbit * 125_000}
    with subprocess.Popen(
        [sys.executable, __file__, json.dumps(spec)], stdout=subprocess.PIPE, text=True
    ) as switch:
        try:
            assert switch.stdout is not None
            if switch.stdout.readline() != "ready\n":
                raise OSError(f"the switch ended with {switch.wait()}")
            yield {number: _address(index) for index, number in enumerate(pids)}
        finally:
            switch.kill()


def _address(index: int) -> str:
    return f"10.78.0.{index + 1}"


def _tap(pid: int, address: str) -> int:
    """A tap device in the network of a process, up."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TAP | IFF_NO_PI))
        for words in (
            ("addr", "add", f"{address}/24", "dev", DEVICE),
            ("link", "set", DEVICE, "mtu", str(MTU), "up"),
        ):
            subprocess.run(["ip", *words], check=True)
    finally:
        libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)
    return tap


def carry(taps: list[int], delay_s: float, bytes_per_s: float) -> None:
    """Carry frames for ever, between two."""
    other = {taps[0]: taps[1], taps[1]: taps[0]}
    free_at = dict.fromkeys(taps, 0.0)
    """When the way from each has carried what it was given."""
    waiting: list[tuple[float, int, int, bytes]] = []
    poll = select.poll()
    for tap in taps:
        poll.register(tap, select.POLLIN)
    number = 0
    while True:
        left_s = waiting[0][0] - time.monotonic() if waiting else 1.0
        for tap, _ in poll.poll(max(0.0, left_s * 1000)):
            for _ in range(FRAMES):
                try:
                    frame = os.read(tap, 65536)
                except BlockingIOError:
                    break
                now = time.monotonic()
                begins = max(now, free_at[tap])
                if begins - now > QUEUE_S:
                    continue
                free_at[tap] = begins + len(frame) / bytes_per_s
                number += 1
                heapq.heappush(waiting, (free_at[tap] + delay_s, number, other[tap], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, tap, frame = heapq.heappop(waiting)
            try:
                os.write(tap, frame)
            except BlockingIOError:
                continue  # full: dropped


def main() -> None:
    spec = json.loads(sys.argv[1])
    taps = [_tap(pid, _address(index)) for index, pid in enumerate(spec["pids"])]
    print("ready", flush=True)
    carry(taps, spec["delay_s"], spec["bytes_per_s"])


if __name__ == "__main__":
    main()
