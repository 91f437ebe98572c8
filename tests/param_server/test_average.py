from dataclasses import replace
from typing import Any

import pytest
import torch

from distbelief.param_server.average import KINDS, Average
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import Group, layout_of
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.protocol import Fetch
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.update import SGD
from tests.param_server.jobs import (
    RUN,
    TOKEN,
    Peer,
    make_contract,
    numbers,
    ready_shard,
    values_of,
)

LR = 0.1


def part_of(average, numel=10, **more):
    named = [("w", torch.nn.Parameter(torch.zeros(numel)))]
    contract = Contract(
        layout=layout_of(named, (Group(lr=LR),), {"w": 0}), rule=SGD(), average=average, **more
    )
    part = Part(contract.layout.parts[0], contract)
    part.load_({VALUES: torch.zeros(part.range.numel)})
    return part


def trained(average, steps=20, samples=4):
    part = part_of(average)
    random = torch.Generator().manual_seed(0)
    iterates = []
    for _ in range(steps):
        part.apply_(torch.randn(part.range.numel, generator=random), samples)
        iterates.append(part.values.clone())
    return part, torch.stack(iterates)


def test_the_mean_is_that_of_all_iterates_after_its_start():
    part, iterates = trained(Average(kind="mean", start=40))
    assert part.averaged == 10
    assert part.version == 20
    assert part.tensors["average"].numpy() == pytest.approx(iterates[10:].mean(0).numpy(), abs=1e-6)


def test_the_exponential_form_begins_as_a_mean_and_forgets_then():
    average = Average(kind="ema", decay=0.8)
    part, iterates = trained(average)
    expected = iterates[0].double()
    for count, values in enumerate(iterates[1:], 1):
        expected = torch.lerp(expected, values.double(), max(0.2, 1 / (count + 1)))
    assert part.tensors["average"].numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    early, iterates = trained(average, steps=5)
    assert early.tensors["average"].numpy() == pytest.approx(iterates.mean(0).numpy(), abs=1e-6)


def test_only_each_so_manieth_update_enters():
    part, iterates = trained(Average(kind="mean", every=3))
    assert part.averaged == 6
    assert part.tensors["average"].numpy() == pytest.approx(
        iterates[2::3].mean(0).numpy(), abs=1e-6
    )
    assert Average(kind="ema", decay=0.9, every=3).weight(10**6) == pytest.approx(1 - 0.9**3)


def test_without_averaging_there_is_no_tensor_for_it():
    part, _ = trained(Average())
    assert part.averaged == 0
    assert "average" not in part.tensors


def test_what_a_reader_has_pinned_does_not_change():
    part, _ = trained(Average(kind="mean"))
    pin = part.pin(("average",))
    before = pin["average"].clone()
    part.apply_(torch.ones(part.range.numel), 4)
    assert pin["average"].equal(before)
    assert not part.tensors["average"].equal(before)
    pin.release()


def test_of_a_noisy_quadratic_the_average_is_nearer_to_the_minimum_than_the_last_iterate():
    part = part_of(Average(kind="mean", start=400), numel=1000)
    part.load_({VALUES: torch.ones(part.range.numel)})
    random = torch.Generator().manual_seed(1)
    for _ in range(1000):
        noise = torch.randn(part.range.numel, generator=random)
        part.apply_(part.values + noise, 1)
    assert part.tensors["average"].norm() < 0.35 * part.values.norm()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "median"}, "none of none, mean, ema"),
        ({"start": -1}, "start >= 0"),
        ({"every": 0}, "every >= 1"),
        ({"tail": 1.5}, "from 0 to 1"),
        ({"decay": 1.0}, r"in \[0, 1\)"),
    ],
)
def test_nonsense_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        Average(**{"kind": "mean", **wrong})


@pytest.mark.parametrize("kind", KINDS)
def test_a_contract_carries_it_and_a_difference_is_named(kind):
    part = part_of(Average(kind=kind))
    assert Contract.from_json(part.contract.to_json()) == part.contract
    other = part_of(Average(kind=kind, every=2)).contract
    assert "every=2" in str(part.contract.first_difference(other))
    assert other.digest != part.contract.digest


def averaging_shard(**more):
    contract = replace(make_contract(), average=Average(kind="mean", **more))
    return (contract, *ready_shard(contract))


def test_a_shard_answers_with_the_average_at_its_own_version():
    _, shard, (peer,) = averaging_shard()
    told, values = peer.fetch(average=True)
    assert set(told.version) == {0}  # there is none yet: the values as they are
    assert torch.cat(values).equal(values_of(shard))
    seen = []
    for seq in (1, 2, 3):
        peer.push_all(numbers(seed=seq), seq)
        seen.append(values_of(shard).clone())
    told, values = peer.fetch(average=True)
    assert set(told.version) == {3}
    assert torch.cat(values).numpy() == pytest.approx(torch.stack(seen).mean(0).numpy(), abs=1e-6)
    assert torch.cat(peer.fetch()[1]).equal(values_of(shard))


def test_an_average_comes_back_from_a_snapshot(tmp_path):
    contract, shard, (peer,) = averaging_shard()
    for seq in (1, 2, 3):
        peer.push_all(numbers(seed=seq), seq)
    store = SnapshotStore(tmp_path)
    image = shard.image()
    store.save(image)
    image.release()
    found = store.latest()
    assert found is not None
    again = Shard(ShardConfig(run=RUN, token=TOKEN, epoch=2), found[0])
    other = Peer(again, "w0", ep=2, connection=b"new")
    other.hello(contract)
    for one in (peer, other):
        assert one.push_all(numbers(seed=4), 4).status == ("applied",) * 3
    before, after = peer.fetch(average=True), other.fetch(average=True)
    assert before[0].version == after[0].version == (4, 4, 4)
    assert torch.cat(before[1]).equal(torch.cat(after[1]))


def test_a_compressed_or_an_empty_answer_of_an_average_is_not_asked_for():
    who: dict[str, Any] = {"run": "r", "w": "w0", "inc": 1, "ep": 1}
    with pytest.raises(ValueError, match="float32"):
        Fetch(**who, part=(0,), average=True, back="int8")
    with pytest.raises(ValueError, match="float32"):
        Fetch(**who, part=(0,), average=True, values=False)
