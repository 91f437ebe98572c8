"""Clusters of which the answer is known in closed form."""

from dataclasses import replace

import pytest

from distbelief.simulation.forecast import forecast
from distbelief.simulation.steps import Steps
from tests.helpers.clusters import CLUSTER, INSTANT, link_takes, shard_takes


def test_one_worker_waits_for_its_push_to_go_and_the_last_piece_to_come_back():
    cluster = replace(
        CLUSTER, workers=1, steps=Steps(0.5), link_gbit=link_takes(0.4), latency_s=0.01
    )
    told = forecast(cluster, INSTANT, seconds=200)
    # There are four pieces: three come back while others go.
    assert told.updates_per_s == pytest.approx(1 / (0.5 + 0.4 + 0.1 + 0.02), rel=0.01)
    assert (told.mean, told.max, told.bottleneck) == (0, 0, "round trip")
    assert told.waiting == pytest.approx(0.52 / 1.02, rel=0.01)


def test_workers_that_only_compute_are_as_fast_as_alone_and_follow_the_law():
    told = forecast(replace(CLUSTER, workers=16), INSTANT)
    assert told.efficiency == pytest.approx(1, abs=0.01)
    assert told.samples_per_s == pytest.approx(16 * 32, rel=0.01)
    assert told.law == 15
    assert told.mean == pytest.approx(15, rel=0.01)
    assert told.p50 == 15
    assert told.bottleneck == "compute"


def test_equal_steps_are_equally_stale():
    told = forecast(replace(CLUSTER, steps=Steps(1.0)), INSTANT)
    assert (told.p50, told.p95, told.max) == (7, 7, 7)


@pytest.mark.parametrize("shards", [1, 4])
def test_where_shards_are_full_they_set_the_pace(shards):
    cluster = replace(CLUSTER, steps=Steps(0.01), shards=shards)
    told = forecast(cluster, shard_takes(0.1))
    assert told.updates_per_s == pytest.approx(10 * shards, rel=0.02)
    assert told.bottleneck == "shard thread"
    assert told.load["shard thread"] > 0.97
    assert told.mean == pytest.approx(7, rel=0.02)


def test_overhead_of_messages_and_parts_is_the_shards_time():
    constants = replace(INSTANT, message_us=20_000.0, part_us=1_000.0)
    told = forecast(replace(CLUSTER, steps=Steps(0.01)), constants)
    assert told.updates_per_s == pytest.approx(1 / (4 * 0.02 + 16 * 0.001), rel=0.02)


def test_where_the_shards_link_is_full_it_sets_the_pace():
    cluster = replace(CLUSTER, steps=Steps(0.01), link_gbit=link_takes(0.1))
    told = forecast(cluster, INSTANT)
    assert told.updates_per_s == pytest.approx(10, rel=0.02)
    assert told.bottleneck in ("link in", "link out")
    told = forecast(replace(cluster, shards=2, shards_per_host=2), INSTANT)
    assert told.updates_per_s == pytest.approx(10, rel=0.02)
    told = forecast(replace(cluster, shards=2), INSTANT)
    assert told.updates_per_s == pytest.approx(20, rel=0.03)


def test_half_as_many_bytes_are_twice_the_pace():
    cluster = replace(CLUSTER, steps=Steps(0.01), link_gbit=link_takes(0.1), form="bfloat16")
    assert forecast(cluster, INSTANT).updates_per_s == pytest.approx(20, rel=0.02)


def test_a_link_that_workers_share_holds_them_up():
    cluster = replace(CLUSTER, steps=Steps(0.01), link_gbit=link_takes(0.1), per_host=8, shards=8)
    told = forecast(cluster, INSTANT)
    assert told.updates_per_s == pytest.approx(10, rel=0.02)
    assert told.bottleneck == "worker link"


def test_encryption_is_the_network_threads_time_there_and_back():
    constants = replace(INSTANT, curve_gb_per_s=0.01)
    cluster = replace(CLUSTER, steps=Steps(0.01))
    told = forecast(cluster, constants)
    assert told.updates_per_s == pytest.approx(5, rel=0.02)
    assert told.bottleneck == "network thread"
    told = forecast(replace(cluster, is_encrypted=False), constants)
    assert told.updates_per_s > 100


def test_what_fetches_seldom_asks_less_of_the_way_back():
    constants = replace(INSTANT, curve_gb_per_s=0.01)
    told = forecast(replace(CLUSTER, steps=Steps(0.01), n_fetch=4), constants)
    assert told.updates_per_s == pytest.approx(1 / (0.1 + 0.1 / 4), rel=0.05)


@pytest.mark.parametrize("n_fetch", [1, 3])
def test_the_mean_follows_the_law_whoever_is_slow(n_fetch):
    cluster = replace(CLUSTER, n_fetch=n_fetch, stragglers=1, factor=6.0)
    told = forecast(cluster, INSTANT, seconds=600)
    assert told.law == 7 * (n_fetch + 1) / 2
    assert told.mean == pytest.approx(told.law, rel=0.03)
    assert told.straggler_share == pytest.approx((1 / 6) / (7 + 1 / 6), rel=0.05)
    assert told.max > 5 * 7


def test_several_steps_in_a_push_are_fewer_updates_of_as_many_samples():
    told = forecast(replace(CLUSTER, n_push=4, n_fetch=4), INSTANT)
    assert told.updates_per_s == pytest.approx(2, rel=0.03)
    assert told.samples_per_s == pytest.approx(8 * 32, rel=0.03)


def test_latest_hides_the_round_trip_and_is_staler():
    cluster = replace(CLUSTER, latency_s=0.2)
    fresh = forecast(cluster, INSTANT)
    latest = forecast(replace(cluster, policy="latest"), INSTANT)
    assert fresh.efficiency == pytest.approx(1 / 1.4, rel=0.02)
    assert latest.efficiency == pytest.approx(1, rel=0.02)
    # What came with a push is computed on one step later.
    assert latest.mean == pytest.approx(2 * 7, rel=0.03)
    assert latest.law is None


def test_with_latest_gradients_accrue_while_a_push_is_on_its_way():
    cluster = replace(CLUSTER, policy="latest", latency_s=0.75, steps=Steps(1.0))
    told = forecast(cluster, INSTANT)
    assert told.updates_per_s == pytest.approx(4, rel=0.02)
    assert told.samples_per_s == pytest.approx(8 * 32, rel=0.02)


def test_what_leaves_during_backward_is_not_waited_for():
    cluster = replace(CLUSTER, workers=1, steps=Steps(1.0), link_gbit=link_takes(0.4))
    told = forecast(replace(cluster, backward=0.8), INSTANT)
    # Only the last of four pieces goes and comes when backward has ended.
    assert told.updates_per_s == pytest.approx(1 / 1.2, rel=0.02)


def test_on_one_host_nothing_passes_a_link():
    cluster = replace(CLUSTER, per_host=8, is_apart=False, link_gbit=1e-6)
    told = forecast(cluster, INSTANT)
    assert told.hosts == 1
    assert told.efficiency == pytest.approx(1, abs=0.01)
    over_tcp = forecast(replace(cluster, shares_memory=False), INSTANT)
    assert over_tcp.load["link in"] == 0
    assert over_tcp.law == 7


def test_who_copies_out_of_shared_memory_sees_later_pushes():
    cluster = replace(CLUSTER, per_host=8, is_apart=False, steps=Steps(0.01))
    copies = dict.fromkeys(INSTANT.worker_gb_per_s, 0.01)  # 0.1 s
    told = forecast(cluster, replace(shard_takes(0.05), worker_gb_per_s=copies))
    assert told.law is None
    assert 5 < told.mean < 6.5


def test_a_shard_among_the_workers_shares_their_link():
    cluster = replace(CLUSTER, steps=Steps(0.01), link_gbit=link_takes(0.1), is_apart=False)
    told = forecast(cluster, INSTANT, seconds=10)
    # The pushes of the worker beside it pass no link.
    assert told.hosts == 8
    assert told.updates_per_s > 10


def test_workers_that_fail_are_missed_while_they_are_away():
    cluster = replace(CLUSTER, worker_mtbf_s=90.0, worker_restart_s=30.0)
    told = forecast(cluster, INSTANT, seconds=1000)
    assert told.lost_workers > 40
    # What it had begun is lost too: half a step.
    assert told.efficiency == pytest.approx((90 - 0.5) / 120, rel=0.1)
    assert told.bottleneck == "failures"


def test_a_shard_that_fails_is_waited_for_and_loses_nothing():
    cluster = replace(CLUSTER, shard_mtbf_s=90.0, shard_recovery_s=30.0)
    told = forecast(cluster, INSTANT, seconds=1500)
    assert told.lost_shards > 6
    assert told.efficiency == pytest.approx(1 - told.lost_shards * 30 / 1500, abs=0.06)
    assert told.mean == pytest.approx(7, rel=0.02)


def test_a_seed_says_all_of_it():
    cluster = replace(CLUSTER, stragglers=1, factor=3.0, worker_mtbf_s=50.0, link_gbit=1.0)
    told = forecast(cluster, INSTANT, seed=3)
    assert forecast(cluster, INSTANT, seed=3) == told
    assert forecast(cluster, INSTANT, seed=4) != told


def test_what_is_too_much_to_play_is_refused():
    with pytest.raises(ValueError, match="fewer minutes"):
        forecast(replace(CLUSTER, workers=5000), INSTANT, seconds=1e6)
    with pytest.raises(ValueError, match="nothing was pushed"):
        forecast(replace(CLUSTER, workers=1), INSTANT, seconds=1e-3)
