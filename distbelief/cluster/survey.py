"""Survey: what all hosts of a cluster have said, judged: a line each, with how to mend it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distbelief.cluster.probe import Facts, Link
from distbelief.cluster.role import ROLES
from distbelief.doctor import BAD, OK, WARN, Check
from distbelief.placement import Host

CLOCK_OFF_S = 1.0
"""Logs of several hosts are read by their times; nothing else asks for them."""
SLOW = 50e6
"""Bytes a second, below which gradients of some million values are felt: compress them."""
FAR_S = 0.05
DISK_WANTED = 2**30


@dataclass(slots=True, kw_only=True)
class Survey:
    """What was found. A text is why something could not be."""

    hosts: Sequence[Host]
    mine: Mapping[str, str]
    """Versions where it was asked from."""
    facts: dict[str, Facts | str] = field(default_factory=dict)
    """By the host's id, as the rest."""
    off_s: dict[str, float] = field(default_factory=dict)
    """How far a clock is ahead of the one here."""
    links: dict[tuple[str, str], Link | str] = field(default_factory=dict)
    """From one to another."""
    store: str = ""
    """`save.store`, where there is one."""
    unstored: dict[str, str] = field(default_factory=dict)
    """Why hosts could not write there."""
    unseen: dict[str, list[str]] = field(default_factory=dict)
    """Whose files hosts did not find there."""

    def checks(self) -> list[Check]:
        return [
            self._hosts(),
            *self._roles(),
            self._versions(),
            self._clocks(),
            self._gpus(),
            self._disks(),
            *self._links(),
            self._store(),
        ]

    def _name(self, host: str) -> str:
        return next(one.name for one in self.hosts if one.id == host)

    def _known(self) -> dict[str, Facts]:
        """By name."""
        return {
            self._name(host): facts
            for host, facts in self.facts.items()
            if not isinstance(facts, str)
        }

    def _hosts(self) -> Check:
        silent = [
            f"{self._name(host)}: {facts}"
            for host, facts in self.facts.items()
            if isinstance(facts, str)
        ]
        if silent:
            return Check(
                "hosts",
                BAD,
                f"{len(silent)} of {len(self.hosts)} do not answer: {'; '.join(silent)}",
                "is distbelief installed there, in the Python that Ray runs with? ray status",
            )
        cpus, gpus = (sum(getattr(host, what) for host in self.hosts) for what in ("cpus", "gpus"))
        return Check("hosts", OK, f"{len(self.hosts)}, with {cpus:g} CPU and {gpus:g} GPU")

    def _roles(self) -> list[Check]:
        tagged = {role: [h.name for h in self.hosts if role in h.tags] for role in ROLES}
        if not any(tagged.values()):
            return []
        text = ", ".join(f"{role}: {' '.join(names) or 'none'}" for role, names in tagged.items())
        if all(tagged.values()):
            return [Check("roles", OK, text)]
        fix = "ray start --resources='{\"ps\": 1}': without hosts of their own they go to any"
        return [Check("roles", WARN, text, fix)]

    def _versions(self) -> Check:
        other = [
            f"{name} has {key} {facts.versions.get(key, 'missing')}, here is {mine}"
            for name, facts in self._known().items()
            for key, mine in self.mine.items()
            if facts.versions.get(key) != mine
        ]
        if other:
            return Check("versions", BAD, "; ".join(other), "install the same on every host")
        return Check("versions", OK, ", ".join(f"{key} {text}" for key, text in self.mine.items()))

    def _clocks(self) -> Check:
        off = {self._name(host): seconds for host, seconds in self.off_s.items()}
        wrong = [f"{name} {s:+.1f} s" for name, s in off.items() if abs(s) > CLOCK_OFF_S]
        if wrong:
            text = f"{', '.join(wrong)}: logs of several hosts come in a wrong order"
            return Check("clocks", WARN, text, "timedatectl set-ntp true, or chrony")
        most = max((abs(seconds) for seconds in off.values()), default=0.0)
        return Check("clocks", OK, f"at most {most * 1000:.0f} ms apart from the one here")

    def _gpus(self) -> Check:
        known = self._known()
        wrong = []
        for host in self.hosts:
            facts = known.get(host.name)
            if facts is None or not host.gpus:
                continue
            if facts.gpus is None or facts.gpus < host.gpus:
                seen = "none: it cannot be imported" if facts.gpus is None else str(facts.gpus)
                wrong.append(f"{host.name}: Ray counts {host.gpus:g}, torch sees {seen}")
        if wrong:
            return Check(
                "gpus",
                BAD,
                "; ".join(wrong),
                "nvidia-smi there; a build of torch with CUDA; workers use none by default",
            )
        return Check("gpus", OK, f"{sum(host.gpus for host in self.hosts):g}, as torch sees them")

    def _disks(self) -> Check:
        full = [
            f"{name} {facts.free / 2**30:.1f} GiB"
            for name, facts in self._known().items()
            if facts.free < DISK_WANTED
        ]
        if full:
            return Check("disks", WARN, f"little is free: {', '.join(full)}", "~/.distbelief/runs")
        least = min((facts.free for facts in self._known().values()), default=0)
        return Check("disks", OK, f"at least {least / 2**30:.0f} GiB free")

    def _links(self) -> list[Check]:
        if not self.links:
            return []
        broken, slow, found = [], [], []
        for (one, other), link in self.links.items():
            way = f"{self._name(one)} to {self._name(other)}"
            if isinstance(link, str):
                broken.append(f"{way}: {link}")
                continue
            found.append(link)
            if link.bytes_per_s < SLOW or link.round_trip_s > FAR_S:
                slow.append(f"{way}: {_rate(link.bytes_per_s)}, {link.round_trip_s * 1000:.1f} ms")
        if broken:
            fix = "a firewall between the hosts? They reach each other on any port, or on net.port"
            return [Check("network", BAD, "; ".join(broken), fix)]
        rates = sorted(link.bytes_per_s for link in found)
        trips = sorted(link.round_trip_s for link in found)
        text = (
            f"{len(found)} ways: {_rate(rates[0])} to {_rate(rates[-1])}, there and back in "
            f"{trips[0] * 1000:.1f} to {trips[-1] * 1000:.1f} ms"
        )
        if slow:
            fix = "--set net.compress_push=int8 net.compress_fetch=bfloat16; distbelief simulate"
            return [Check("network", WARN, f"{text}; slow are {'; '.join(slow[:5])}", fix)]
        return [Check("network", OK, text)]

    def _store(self) -> Check:
        if not self.store:
            return Check(
                "store",
                WARN,
                "save.store is not set: a host that is lost takes its shards' snapshots with it",
                "--set save.store=s3://bucket/runs, or a path that all hosts have mounted",
            )
        if self.unstored:
            why = "; ".join(f"{self._name(h)}: {text}" for h, text in self.unstored.items())
            fix = "mount it on every host, or give every host its credentials"
            return Check("store", BAD, f"{self.store} cannot be used: {why}", fix)
        if self.unseen:
            who = "; ".join(
                f"{self._name(host)} does not see what {', '.join(map(self._name, others))} wrote"
                for host, others in self.unseen.items()
            )
            fix = "it has to be one disk, mounted everywhere, or a URL"
            return Check("store", BAD, f"{self.store} is not the same for all: {who}", fix)
        return Check("store", OK, f"{self.store}: all hosts write there and see each other's files")


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2f} Gbit/s"
