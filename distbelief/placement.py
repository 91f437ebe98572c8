"""Placement: which host each process of a run goes to. Pure: it knows no Ray and no clock.

1. A shard goes where the fewest shards are for the cores there, so that memory and network are
   shared out; to hosts that are tagged for shards, where there are such hosts.
2. A worker with a GPU, or a share of one, goes to the host that has the least room left for it, so
   that GPUs are filled one after another; to hosts that are tagged for workers, where there are.
3. A worker without goes where the most cores are free.
4. The launcher's host, which has the controller, the monitor and the evaluator, and hosts that have
   GPUs (for what needs none), are taken when the others are full.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

EPSILON = 1e-6
"""Shares of a CPU or a GPU are added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that processes can be placed on."""

    id: str
    """The engine's own."""
    name: str
    """For people."""
    address: str
    """At which the others reach it."""
    cpus: float
    gpus: float = 0.0
    tags: frozenset[str] = frozenset()
    """What it is there for, as whoever runs the cluster says: `ps`, `worker`."""
    is_launcher: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a process of a role holds of its host."""

    cpus: float
    gpus: float = 0.0
    tag: str = ""
    """It goes to hosts with this tag, where there are any."""

    @property
    def text(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}"


@dataclass(slots=True)
class Placement:
    """Who is where. Used by one thread."""

    needs: Mapping[str, Need]
    """By role: worker, shard."""
    hosts: dict[str, Host] = field(default_factory=dict)
    """By id; those that can be reached now."""
    places: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name of the process: its role, and the id of its host."""

    def place(self, name: str, role: str, only: str = "") -> Host | None:
        """Give a process its place; None where there is no room now. only: on that host alone."""
        self.places.pop(name, None)
        fitting = [host for host in self._suiting(role) if self._has_room(host, role)]
        if only:
            fitting = [host for host in self.hosts.values() if host.id == only]
        if not fitting:
            return None
        best = min(fitting, key=lambda host: self._order(host, role))
        self.places[name] = (role, best.id)
        return best

    def free(self, name: str) -> None:
        """A process has ended: its place is free."""
        self.places.pop(name, None)

    def workers_at(self, host: str) -> int:
        return sum(place == ("worker", host) for place in self.places.values())

    def room(self, role: str) -> int:
        """How many more processes of a role there is room for."""
        trial = Placement(self.needs, dict(self.hosts), dict(self.places))
        number = 0
        while number < 10_000 and trial.place(f"+{number}", role) is not None:
            number += 1
        return number

    def _suiting(self, role: str) -> list[Host]:
        tag = self.needs[role].tag
        tagged = [host for host in self.hosts.values() if tag and tag in host.tags]
        return tagged or list(self.hosts.values())

    def _has_room(self, host: Host, role: str) -> bool:
        need = self.needs[role]
        if need.gpus and not self._gpu_room(host):
            return False
        return need.cpus <= self._cpus_left(host) + EPSILON

    def _cpus_left(self, host: Host) -> float:
        held = (self.needs[role].cpus for role, where in self.places.values() if where == host.id)
        return host.cpus - sum(held)

    def _gpu_room(self, host: Host) -> int:
        """Workers for which there are GPUs. A share is of one GPU: 0.6 twice takes two."""
        each = self.needs["worker"].gpus
        whole = host.gpus // each if each >= 1 else int(host.gpus) * int(1 / each + EPSILON)
        return max(0, int(whole) - self.workers_at(host.id))

    def _order(self, host: Host, role: str) -> tuple[float, ...]:
        """The smallest one is taken."""
        if role == "shard":
            shards = sum(place == ("shard", host.id) for place in self.places.values())
            return (host.is_launcher, host.gpus > 0, (shards + 1) / max(host.cpus, 1.0))
        if self.needs[role].gpus:
            return (self._gpu_room(host), host.is_launcher)
        return (host.is_launcher, host.gpus > 0, -self._cpus_left(host))


def shortage(placement: Placement, shards: int, workers: int) -> str:
    """Why so many shards and workers do not fit on the hosts; empty where they do."""
    trial = Placement(placement.needs, placement.hosts)
    for role, number in (("shard", shards), ("worker", workers)):
        for index in range(number):
            if trial.place(f"{role}{index}", role) is None:
                return _lack(placement, role, number, index, shards)
    return ""


def _lack(placement: Placement, role: str, number: int, room: int, shards: int) -> str:
    need, hosts = placement.needs[role], placement.hosts.values()
    wanted = f"{number} {role}s with {need.text} each"
    if role == "worker" and need.gpus * number > total(hosts, "gpus"):
        return (
            f"{wanted} need {need.gpus * number:g} GPU, the cluster has {total(hosts, 'gpus'):g}: "
            f"room for {room}"
        )
    beside = f" beside {shards} shards" if role == "worker" else ""
    where = ", ".join(
        f"{host.name} {host.cpus:g} CPU" + (f" {host.gpus:g} GPU" if host.gpus else "")
        for host in sorted(hosts, key=lambda host: host.name)[:8]
    )
    return (
        f"{wanted} need {need.cpus * number:g} CPU{beside}, the cluster has "
        f"{total(hosts, 'cpus'):g} ({where}): room for {room}"
    )


def total(hosts: Iterable[Host], what: str) -> float:
    """Of `cpus` or `gpus`."""
    return float(sum(getattr(host, what) for host in hosts))
