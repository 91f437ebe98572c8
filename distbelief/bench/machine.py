"""Machine: what the kernel counts for processes and for the whole machine. Linux's /proc only.

Times are in seconds of processor time, in steps of 1 / CLK_TCK (10 ms).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MB = 1e6
SHARED = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")
"""How names of memory begin that several processes may map."""
SHARD = "/memfd:distbelief-shard"
"""Of the shared memory: what a server itself holds."""


@dataclass(frozen=True, slots=True)
class Use:
    """What some processes have used since they were started."""

    cpu_s: float = 0.0
    faults: int = 0
    """Minor page faults."""

    def __sub__(self, other: "Use") -> "Use":
        return Use(self.cpu_s - other.cpu_s, self.faults - other.faults)


@dataclass(frozen=True, slots=True)
class Busy:
    """What all cores together have done since the machine was started."""

    cpu_s: float
    stolen_s: float
    """Taken by the hypervisor for other machines."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of a process that is in use, in MB of 10^6 bytes."""

    own_mb: float
    """Its own: heap, files, and the shared memory that it has made as a server."""
    mapped_mb: float
    """Shared memory of others that it merely maps: workers' gradients."""

    def __add__(self, other: "Resident") -> "Resident":
        return Resident(self.own_mb + other.own_mb, self.mapped_mb + other.mapped_mb)


def use_of(roots: Iterable[int]) -> Use:
    """What these processes and all their descendants have used; those that have ended are not in.

    Raises: nothing: a process that goes while it is looked at counts as gone.
    """
    family = _family(roots)
    return Use(sum(use.cpu_s for use in family.values()), sum(u.faults for u in family.values()))


def descendants(root: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    return [pid for pid in _family([root]) if pid != root]


def _family(roots: Iterable[int]) -> dict[int, Use]:
    """By pid, of these processes and all their descendants."""
    found: dict[int, tuple[int, Use]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))) is not None:
            found[int(name)] = stat
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in found.items():
        children.setdefault(parent, []).append(pid)
    family: dict[int, Use] = {}
    todo = list(roots)
    while todo:
        pid = todo.pop()
        if pid in found and pid not in family:
            family[pid] = found[pid][1]
            todo += children.get(pid, [])
    return family


def _stat(pid: int) -> tuple[int, Use] | None:
    """Parent and use of one process. Source: proc(5), fields 4, 10, 14 and 15 of stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # a name may hold spaces and brackets
    return int(fields[1]), Use((int(fields[11]) + int(fields[12])) * TICK_S, int(fields[7]))


def busy() -> Busy:
    """Of the whole machine, by now. Source: proc(5), first line of stat."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return Busy((user + nice + system + irq + softirq) * TICK_S, steal * TICK_S)


def resident(pid: int) -> Resident:
    """Memory of one process; of none any more, zero.

    It reads smaps, which takes some ms: not inside a window.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return Resident(0.0, 0.0)
    return resident_of(lines)


def resident_of(smaps: Iterable[str]) -> Resident:
    """As `resident`, of the lines of an smaps file."""
    own = mapped = 0
    is_foreign = False
    for line in smaps:
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # the head of a mapping: addresses, then its name
            name = (rest.split(maxsplit=4) + [""] * 5)[4]
            is_foreign = name.startswith(SHARED) and not name.startswith(SHARD)
        elif first == "Rss:":
            size = 1024 * int(rest.split()[0])
            if is_foreign:
                mapped += size
            else:
                own += size
    return Resident(own / MB, mapped / MB)
