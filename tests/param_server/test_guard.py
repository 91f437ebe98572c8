"""Poison: what a shard refuses although it fits, whom it sends away, whether values stay finite."""

import pytest
import torch

from distbelief.param_server.guard import (
    CHECK_EVERY,
    MEDIAN_EVERY,
    NORMS_LEAST,
    Guard,
    GuardConfig,
)
from distbelief.param_server.protocol import Ack, Refusal
from distbelief.param_server.server import ShardServer
from distbelief.param_server.snapshot import SnapshotStore
from tests.param_server.jobs import (
    LAYOUT,
    Peer,
    make_contract,
    numbers,
    ready_shard,
    state_of,
    values_of,
)
from tests.param_server.test_server import Clock, Wire


def guarded(**config):
    return ready_shard(workers=2, guard=GuardConfig(**config))


def bad(at=70, value=float("nan")):
    grad = numbers(seed=1)
    grad[at] = value
    return grad


# Norms


def test_a_part_above_the_largest_norm_is_refused_by_worker_tensor_and_index():
    shard, [_, peer] = guarded(max_norm=100.0)
    before = values_of(shard)[64:128].clone()
    ack = peer.push_all(bad(70, -500.0), 1)
    assert ack.status == ("applied", "norm", "applied")
    assert "w1 push 1 part 1: the gradient's norm is 500, above 100 (guard.max_norm)" in ack.text[1]
    assert "the largest is w[70] = -500" in ack.text[1]
    assert torch.equal(values_of(shard)[64:128], before)
    assert peer.push_all(numbers(), 2).status == ("applied",) * 3


@pytest.mark.parametrize("value", [1e30, 3e38, -3e38])
def test_finite_values_whose_squares_overflow_are_refused_by_their_place(value):
    shard, [peer, _] = ready_shard(workers=2)
    ack = peer.push_all(bad(140, value), 1)
    assert ack.status == ("applied", "applied", "nonfinite")
    assert "their squares overflow float32: the largest is v[3] = " in ack.text[2]
    assert shard.check_values()


def test_no_norm_is_too_large_unless_that_is_switched_on():
    shard, [peer, _] = ready_shard(workers=2)
    assert peer.push_all(bad(70, 1e15), 1).status == ("applied",) * 3
    assert shard.counts["norm"] == 0


def test_a_norm_far_above_the_usual_one_is_refused_once_there_is_a_usual_one():
    _, [peer, _] = guarded(norm_factor=10.0)
    usual = torch.ones(LAYOUT.total)
    for seq in range(1, NORMS_LEAST):
        assert peer.push_all(100.0 * usual, seq).status == ("applied",) * 3  # nothing is usual yet
    for seq in range(NORMS_LEAST, NORMS_LEAST + MEDIAN_EVERY):
        peer.push_all(100.0 * usual, seq)
    seq = NORMS_LEAST + MEDIAN_EVERY
    assert peer.push_all(900.0 * usual, seq).status == ("applied",) * 3
    ack = peer.push_all(1100.0 * usual, seq + 1)
    assert ack.status == ("norm",) * 3
    assert "10 times the median 800" in ack.text[0]  # 100 in each of 64 elements


def test_what_was_refused_does_not_become_usual():
    guard = Guard(GuardConfig(norm_factor=2.0))
    for _ in range(NORMS_LEAST):
        guard.take(0, 1.0)
    assert guard.limit(0)[0] == 2.0
    assert guard.limit(1) == (0.0, "")


def test_the_smaller_of_two_limits_holds():
    guard = Guard(GuardConfig(norm_factor=10.0, max_norm=5.0))
    for _ in range(NORMS_LEAST):
        guard.take(0, 0.1)
    assert guard.limit(0)[0] == pytest.approx(1.0)
    assert guard.limit(1) == (5.0, "guard.max_norm")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_norm": -1.0}, "guard.max_norm must be at least 0"),
        ({"norm_factor": 1.0}, "guard.norm_factor must be 0 or above 1"),
        ({"norm_factor": float("nan")}, "guard.norm_factor"),
        ({"quarantine": -1}, "guard.quarantine must be at least 0"),
    ],
)
def test_a_guard_of_no_sense_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        GuardConfig(**config)


# Quarantine


def test_a_worker_that_is_refused_again_and_again_is_sent_away_and_others_are_not():
    shard, [good, peer] = guarded(quarantine=3)
    for seq in (1, 2, 3):
        assert peer.push_all(bad(), seq).status[1] == "nonfinite"
        assert good.push_all(numbers(), seq).status == ("applied",) * 3
    before = state_of(shard)
    refusal = peer.ask(*peer.make_push({0: torch.ones(64)}, 4))
    assert isinstance(refusal, Refusal)
    assert refusal.code == "quarantine"
    assert "w1 was refused 3 pushes in a row, the last because w1 push 3 part 1" in refusal.text
    assert "w[70] is nan" in refusal.text
    assert state_of(shard)["parts"] == before["parts"]
    assert peer.hello(make_contract()).code == "quarantine"
    assert good.push_all(numbers(), 4).status == ("applied",) * 3
    assert shard.stats()["refused_in_a_row"] == {"w1": 3}


def test_its_next_incarnation_begins_anew():
    shard, [_, peer] = guarded(quarantine=2)
    for seq in (1, 2):
        peer.push_all(bad(), seq)
    again = Peer(shard, "w1", inc=2)
    again.hello(make_contract())
    assert isinstance(again.push_all(bad(), 1), Ack)
    assert isinstance(again.push_all(numbers(), 2), Ack)


def test_one_good_push_in_between_ends_the_row():
    shard, [_, peer] = guarded(quarantine=2)
    for seq in range(1, 12):
        peer.push_all(bad() if seq % 2 else numbers(), seq)
    assert shard.counts["nonfinite"] == 6
    assert shard.counts["quarantine"] == 0


def test_a_push_in_many_messages_counts_once():
    _, [_, peer] = guarded(quarantine=2)
    for part in (0, 1, 2):
        grad = torch.full((59 if part == 2 else 64,), float("nan"))
        assert isinstance(peer.push({part: grad}, 1), Ack)


def test_without_a_quarantine_a_worker_goes_on():
    _, [_, peer] = guarded(quarantine=0)
    for seq in range(1, 30):
        assert isinstance(peer.push_all(bad(), seq), Ack)


def test_repetitions_and_holes_are_no_refusals():
    _, [_, peer] = guarded(quarantine=2)
    peer.push_all(numbers(), 1)
    for _ in range(5):
        assert set(peer.push_all(numbers(), 1).status) == {"dup"}
        assert set(peer.push_all(numbers(), 9).status) == {"gap"}
    assert isinstance(peer.push_all(numbers(), 2), Ack)


# Values


def test_values_that_finite_gradients_have_spoiled_are_found_and_never_saved(tmp_path):
    shard, [peer, _] = ready_shard(workers=2)
    store, wire = SnapshotStore(tmp_path), Wire()
    server = ShardServer(shard, wire, store, clock=Clock())
    for seq in range(1, CHECK_EVERY + 1):
        grad = torch.zeros(LAYOUT.total)
        grad[100] = 1e19  # its square is finite; so are 18 of these at a rate of 0.1, and 20 not
        assert set(peer.push_all(grad, seq).status) == {"applied"}
    assert "values of part 1: every value is finite, but their squares overflow" in shard.spoiled
    assert "w[100] = -6.4e+19" in shard.spoiled
    assert "after a push of w0" in shard.spoiled
    server.serve(lambda: False)  # it ends by itself
    assert store.names() == []


def test_spoiled_values_are_found_before_a_snapshot_whenever_it_comes(tmp_path):
    shard, _ = ready_shard()
    store = SnapshotStore(tmp_path)
    server = ShardServer(shard, Wire(), store, clock=Clock())
    shard.parts[2].values[3] = float("inf")
    shard.num_changes += 1
    server.serve(lambda: True)
    assert shard.spoiled.startswith("values of b[1] is inf (1 values of part 2")
    assert store.names() == []


def test_sound_values_are_saved(tmp_path):
    shard, [peer] = ready_shard()
    peer.push_all(numbers(), 1)
    store = SnapshotStore(tmp_path)
    ShardServer(shard, Wire(), store, clock=Clock()).serve(lambda: True)
    assert len(store.names()) == 1
    assert shard.spoiled == ""
