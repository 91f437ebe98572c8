import json
from collections import Counter
from dataclasses import replace
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbelief.bench.constants import measure
from distbelief.bench.work import Work
from distbelief.param_server.partition import Partition
from distbelief.simulation.cluster import PIECES_MAX
from distbelief.simulation.constants import Constants
from distbelief.simulation.defaults import DEFAULTS
from distbelief.simulation.steps import Steps
from tests.helpers.clusters import CLUSTER


@given(st.integers(1, 2**26), st.integers(1, 24))
def test_the_model_is_cut_as_the_layout_cuts_it_and_shared_as_the_partition_does(size, shards):
    layout = Work.flat(size).layout
    shards = min(shards, len(layout.parts))
    cluster = replace(CLUSTER, parameters=size, shards=shards)
    assert (cluster.part_numel, cluster.num_parts) == (layout.part_numel, len(layout.parts))
    pieces = cluster.pieces()
    assert sum(piece.numel for piece in pieces) == size
    parts: Counter[int] = Counter()
    for piece in pieces:
        parts[piece.shard] += piece.parts
    partition = Partition(layout, shards)
    assert parts == {shard: len(partition.parts_of(shard)) for shard in range(shards)}
    assert len(pieces) <= max(PIECES_MAX, shards)


def test_googlenet_travels_in_as_many_messages_as_the_client_sends():
    cluster = replace(CLUSTER, parameters=6_998_552)
    assert (cluster.num_parts, len(cluster.pieces())) == (27, 14)
    assert len(replace(cluster, shards=27).pieces()) == 27
    near = replace(cluster, per_host=8, is_apart=False)
    assert len(near.pieces()) == 1
    assert len(replace(near, workers=1).pieces()) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"n_fetch": 3, "n_push": 2}, "no multiple"),
        ({"policy": "newest"}, "neither fresh nor latest"),
        ({"form": "topk"}, "none of float32"),
        ({"stragglers": 9}, "9 stragglers among 8"),
        ({"shards": 17}, "at most 16"),
        ({"link_gbit": 0.0}, "link_gbit must be above 0"),
        ({"latency_s": -1.0}, "latency_s must be at least 0"),
        ({"backward": 1.0}, "backward"),
        ({"worker_mtbf_s": 0.0}, "worker_mtbf_s"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        replace(CLUSTER, **change)


def test_steps_have_the_mean_and_the_noise_that_was_asked_for():
    random = Random(1)
    drawn = [Steps(0.5, 0.3).draw(random) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(0.5, rel=0.02)
    assert pstdev(drawn) == pytest.approx(0.15, rel=0.05)
    measured = Steps.of([0.1, 0.2, 0.6])
    assert measured.mean_s == pytest.approx(0.3)
    assert {measured.draw(random) for _ in range(100)} == {0.1, 0.2, 0.6}


@pytest.mark.parametrize("seconds", [[], [0.1, 0.0], [float("nan")]])
def test_lengths_of_steps_that_are_none_are_refused(seconds):
    with pytest.raises(ValueError, match=r"steps|length"):
        Steps.of(seconds)


def test_constants_are_read_as_they_were_written():
    assert Constants.from_json(DEFAULTS.to_json()) == DEFAULTS


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"part_us": 0}, "part_us must be a number above 0"),
        ({"part_us": "2"}, "part_us must be a number"),
        ({"shard_gb_per_s": {"float32": 1.0}}, "shard_gb_per_s must have"),
        ({"more": 1}, "unknown 'more'"),
    ],
)
def test_constants_that_are_none_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        Constants.from_json(json.dumps({**json.loads(DEFAULTS.to_json()), **change}))
    with pytest.raises(ValueError, match="no JSON object"):
        Constants.from_json("[]")


def test_constants_are_measured_on_this_machine():
    found = measure(0.01, size=2**20)
    assert Constants.from_json(found.to_json()) == found
    # However busy the machine, these are more than nothing and less than memory.
    assert 0.001 < found.shard_gb_per_s["float32"] < 100
    assert 0.001 < found.worker_gb_per_s["float32"] < 100
    assert 0.001 < found.tcp_gb_per_s < 100
    assert found.round_trip_us > 1
