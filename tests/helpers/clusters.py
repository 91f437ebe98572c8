"""Clusters of which only one thing takes time, so that a forecast can be worked out by hand."""

from dataclasses import replace

from distbelief.simulation.cluster import Cluster
from distbelief.simulation.constants import FORMS, LOCAL, Constants
from distbelief.simulation.steps import Steps

INSTANT = Constants(
    shard_gb_per_s=dict.fromkeys((*FORMS, LOCAL), 1e9),
    worker_gb_per_s=dict.fromkeys((*FORMS, LOCAL), 1e9),
    part_us=1e-6,
    message_us=1e-6,
    tcp_gb_per_s=1e9,
    curve_gb_per_s=1e9,
    round_trip_us=1e-6,
)
PARAMETERS = 250_000
"""A megabyte."""
CLUSTER = Cluster(
    workers=8,
    shards=1,
    parameters=PARAMETERS,
    steps=Steps(1.0, 0.2),
    link_gbit=1e9,
    latency_s=0.0,
)


def shard_takes(seconds: float) -> Constants:
    """A shard's thread for one push of all PARAMETERS."""
    speeds = dict.fromkeys((*FORMS, LOCAL), 4e-9 * PARAMETERS / seconds)
    return replace(INSTANT, shard_gb_per_s=speeds)


def link_takes(seconds: float) -> float:
    """Of the link's rate in Gbit/s: it carries one push of all PARAMETERS in that time."""
    return replace(CLUSTER, link_gbit=1.0).push_bytes / seconds * 8e-9 / 0.94
