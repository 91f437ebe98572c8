"""RaySurvey: have a probe on every host of a Ray cluster look, and put together what they say."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distbelief.cluster.probe import Probe
from distbelief.cluster.survey import Survey
from distbelief.outpost import versions
from distbelief.placement import Host
from distbelief.ray_hosts import first_line, join, nodes

ANSWER_S = 90.0
PAIRS_MAX = 56
"""All ways between up to 8 hosts; of more only those to the next one."""


def survey(address: str, store: str) -> Survey:
    """Look at the hosts of a cluster; some seconds, and half a second for each way between two.

    store: `save.store`, empty for none. Raises: Problem if the cluster cannot be reached.
    """
    with _joined(address) as me:
        hosts = sorted(nodes(me).values(), key=lambda host: host.name)
        found = Survey(hosts=hosts, mine=versions(), store=store)
        probes = {host.id: _probe(host) for host in hosts}
        asked = {host: probe.facts.remote() for host, probe in probes.items()}
        for name, answer in asked.items():
            found.facts[name] = _take(answer)
        alive = [host for host in hosts if not isinstance(found.facts[host.id], str)]
        for host in alive:
            began = time.time()
            there = _take(probes[host.id].clock.remote())
            if isinstance(there, float):
                found.off_s[host.id] = there - (began + time.time()) / 2
        for one, other in _pairs(alive):
            port = _take(probes[other.id].listen.remote(other.address))
            found.links[one.id, other.id] = (
                port
                if isinstance(port, str)
                else _take(probes[one.id].reach.remote(other.address, port))
            )
        if store:
            _look_at_store(found, alive, probes)
        return found


@contextmanager
def _joined(address: str) -> Iterator[str]:
    """Gives the id of this host. Raises: Problem."""
    join(address)
    try:
        me: str = ray.get_runtime_context().get_node_id()
        yield me
    finally:
        ray.shutdown()


def _probe(host: Host) -> Any:  # Any: Ray's actor handle
    at: Any = NodeAffinitySchedulingStrategy(host.id, soft=False)  # Any: Ray's types
    remote: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=at)
    return remote(Probe).remote()


def _take(answer: Any) -> Any:  # Any: as of the probe's methods
    """An answer; or why there is none."""
    try:
        return ray.get(answer, timeout=ANSWER_S)
    except RayError as error:
        return first_line(error)


def _pairs(hosts: Sequence[Host]) -> list[tuple[Host, Host]]:
    pairs = [(one, other) for one in hosts for other in hosts if one is not other]
    if len(pairs) <= PAIRS_MAX:
        return pairs
    return list(zip(hosts, [*hosts[1:], hosts[0]], strict=True))


def _look_at_store(found: Survey, hosts: Sequence[Host], probes: dict[str, Any]) -> None:
    run = f"doctor-{secrets.token_hex(4)}"
    for host in hosts:
        if why := _take(probes[host.id].store.remote(found.store, run, host.id)):
            found.unstored[host.id] = why
    if found.unstored:
        return
    wanted = {host.id for host in hosts}
    for host in hosts:
        seen = _take(probes[host.id].stored.remote(found.store, run))
        if isinstance(seen, str):
            found.unstored[host.id] = seen
        elif missing := sorted(wanted.difference(seen)):
            found.unseen[host.id] = missing
    for host in hosts:
        _take(probes[host.id].clear.remote(found.store, run, sorted(wanted)))
