"""Rule: how many shards a job needs, in closed form; `Model` plays what it says.

Workers that never waited would make `Cluster.pushes_per_s` pushes a second. Each push takes so many
seconds of the shards' threads, of their network threads, and of their hosts' links; spread over n
shards, each resource must not be busy for more than AIM of the time, or queues grow long:

    n >= pushes_per_s * seconds of a push / AIM          for each resource

Parts are whole: of 27 on 10 shards some have 3, and those set the pace. So n is the least number
whose fullest shard has no more than P / (that bound) of the P parts. A model of P parts cannot have
more than P shards, and its workers' own links must carry what they
push and fetch, which no number of shards mends.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distbelief.simulation.cluster import PARTS_OF_SHARD_MAX, Cluster
from distbelief.simulation.constants import Constants
from distbelief.simulation.cost import Cost

AIM = 0.7
"""Share of the time for which a shard or link may be busy."""
ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What the rule says of a cluster, whose own number of shards it does not look at."""

    shards: int
    """That keep up with the workers, if there may be so many; else as many as there may be."""
    wanted: int
    """That would keep up with them."""
    most: int
    """The parts of the model."""
    by: Mapping[str, float]
    """Resource -> shards that it alone asks for, before rounding up."""
    worker_link: float
    """Share of the time for which a worker host's link would be busy, the busier way."""

    @property
    def reason(self) -> str:
        """The resource that asks for most."""
        return max(self.by, key=lambda name: self.by[name])

    @property
    def is_enough(self) -> bool:
        return self.wanted <= self.most and self.worker_link <= AIM


def advise(cluster: Cluster, constants: Constants) -> Advice:
    """The rule, at the top of this file."""
    advice = _advise(replace(cluster, shards=1), constants)
    for _ in range(ROUNDS):
        again = _advise(replace(cluster, shards=advice.shards), constants)
        if again.shards <= advice.shards:
            break
        advice = again  # more shards are more messages, which cost their threads something
    return advice


def _advise(cluster: Cluster, constants: Constants) -> Advice:
    rate, wait = cluster.pushes_per_s, seconds(cluster, constants)
    fetches = 1 / cluster.per_fetch
    link_s = 0.0 if cluster.hosts == 1 else cluster.push_bytes / cluster.link_bytes_per_s
    # What the workers of a host push and fetch, of the seconds in a second.
    pushed = rate * link_s * min(cluster.per_host, cluster.workers) / cluster.workers
    worker_link = pushed * max(1.0, fetches)
    by = {
        "shard thread": rate * wait["shard thread"] / AIM,
        "network thread": rate * wait["network thread"] / AIM,
    }
    for name, way, own in (
        ("link in", 1.0, pushed * fetches),
        ("link out", fetches, pushed),
    ):
        # On the workers' own hosts a shard has what those leave of the link.
        room = AIM - (0.0 if cluster.is_apart else min(own, AIM - 0.01))
        by[name] = rate * link_s * way / room * cluster.shards_per_host
    most = cluster.num_parts
    least = -(-most // PARTS_OF_SHARD_MAX)
    wanted = max(least, *(_whole(number, most) for number in by.values()))
    return Advice(
        shards=min(wanted, most), wanted=wanted, most=most, by=by, worker_link=worker_link
    )


def _whole(shards: float, parts: int) -> int:
    """Of which the fullest has no more than an even share of `shards`."""
    if shards > parts:
        return math.ceil(shards)
    return -(-parts // math.floor(parts / max(shards, 1.0)))


def seconds(cluster: Cluster, constants: Constants) -> Mapping[str, float]:
    """By resource, what one push takes of the threads of all shards together."""
    is_local = cluster.hosts == 1
    costs = [Cost.of(p, cluster, constants, is_local=is_local) for p in cluster.pieces()]
    return {
        "shard thread": sum(cost.shard_s for cost in costs),
        "network thread": sum(cost.net_s for cost in costs) * (1 + 1 / cluster.per_fetch),
    }


def most_pushes_per_s(cluster: Cluster, constants: Constants) -> Mapping[str, float]:
    """By resource, what this number of shards takes at most, of workers that are fast enough."""
    wait, fetches = seconds(cluster, constants), 1 / cluster.per_fetch
    found = {name: cluster.shards / took for name, took in wait.items() if took}
    if cluster.hosts > 1:
        link = cluster.link_bytes_per_s / cluster.push_bytes
        found["link in"] = cluster.shard_hosts * link
        found["link out"] = cluster.shard_hosts * link / fetches
        found["worker link"] = cluster.worker_hosts * link / max(1.0, fetches)
    return found
