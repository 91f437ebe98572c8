"""The rule in closed form, and held against what is played."""

from dataclasses import replace

import pytest

from distbelief.simulation.defaults import DEFAULTS
from distbelief.simulation.forecast import forecast
from distbelief.simulation.rule import AIM, advise
from distbelief.simulation.steps import Steps
from tests.helpers.clusters import CLUSTER, INSTANT, link_takes, shard_takes

GOOGLENET = replace(CLUSTER, parameters=6_998_552, steps=Steps(0.84, 0.06), latency_s=1e-4)


def test_a_shard_may_be_busy_for_seven_tenths_of_the_time():
    # 8 pushes a second of 0.2 s each are 1.6 seconds of work in a second.
    advice = advise(CLUSTER, shard_takes(0.2))
    assert advice.by["shard thread"] == pytest.approx(1.6 / AIM)
    assert (advice.shards, advice.reason, advice.is_enough) == (3, "shard thread", True)


def test_shards_of_one_host_share_its_link():
    cluster = replace(CLUSTER, link_gbit=link_takes(0.2))
    assert advise(cluster, INSTANT).shards == 3
    advice = advise(replace(cluster, shards_per_host=2), INSTANT)
    assert advice.by["link in"] == pytest.approx(2 * 1.6 / AIM)
    # Of 16 parts no shard may have more than 3.
    assert (advice.shards, advice.reason) == (6, "link in")


def test_stragglers_and_seldom_pushes_ask_for_less():
    assert advise(replace(CLUSTER, stragglers=8, factor=8.0), shard_takes(0.2)).shards == 1
    assert advise(replace(CLUSTER, n_push=8, n_fetch=8), shard_takes(0.2)).shards == 1


def test_there_are_no_more_shards_than_parts():
    advice = advise(replace(CLUSTER, workers=500), shard_takes(0.2))
    assert (advice.shards, advice.most) == (16, 16)
    assert advice.wanted == pytest.approx(500 * 0.2 / AIM, abs=1)
    assert not advice.is_enough


def test_a_model_of_very_many_parts_needs_shards_to_hold_them():
    cluster = replace(CLUSTER, workers=1, parameters=3 * 1024 * 2**18)
    assert advise(cluster, INSTANT).shards == 3


def test_no_number_of_shards_mends_the_workers_own_links():
    advice = advise(replace(CLUSTER, per_host=8, link_gbit=link_takes(0.2)), INSTANT)
    assert advice.worker_link == pytest.approx(1.6)
    assert not advice.is_enough


@pytest.mark.parametrize(
    "cluster",
    [
        replace(GOOGLENET, workers=32, link_gbit=2.5, is_encrypted=False),
        replace(GOOGLENET, workers=40, link_gbit=100.0),
        replace(GOOGLENET, workers=48, form="int8", link_gbit=0.4, is_encrypted=False),
        replace(GOOGLENET, workers=32, link_gbit=5.0, is_encrypted=False, shards_per_host=2),
    ],
    ids=["link", "encryption", "int8", "two a host"],
)
def test_what_the_rule_says_keeps_up_when_it_is_played_and_half_of_it_does_not(cluster):
    cluster = replace(cluster, backward=0.6)
    advice = advise(cluster, DEFAULTS)
    assert advice.shards >= 4
    assert advice.is_enough
    enough = forecast(replace(cluster, shards=advice.shards), DEFAULTS, seconds=3)
    assert enough.efficiency > 0.93
    kinds = ("shard thread", "network thread", "link in", "link out")
    assert max(enough.load[kind] for kind in kinds) < AIM + 0.1
    few = int(advice.by[advice.reason] / 2)
    half = forecast(replace(cluster, shards=few), DEFAULTS, seconds=3)
    assert half.efficiency < 0.93 * enough.efficiency
