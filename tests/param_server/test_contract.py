"""What all sides agree on, and a model's buffers in it."""

import pytest
import torch
from torch import nn

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import SGD, Adagrad, Adam
from tests.param_server.jobs import BUFFERS, TWO_GROUPS, make_contract

EVERY = [
    make_contract(),
    make_contract(TWO_GROUPS, Adam(decoupled=True), Schedule(kind="poly", total=9, warmup=3)),
    make_contract(rule=SGD(momentum=0.9, nesterov=True), clip_part_norm=1.5),
    make_contract(rule=Adagrad(), buffers=BUFFERS),
]


@pytest.mark.parametrize("contract", EVERY, ids=range(len(EVERY)))
def test_a_contract_survives_json_with_its_digest(contract):
    again = Contract.from_json(contract.to_json())
    assert again == contract
    assert again.digest == contract.digest
    assert contract.first_difference(again) is None


def test_different_contracts_have_different_digests_and_a_difference_in_words():
    assert len({contract.digest for contract in EVERY}) == len(EVERY)
    for one in EVERY:
        for two in EVERY:
            assert (one.first_difference(two) is None) == (one is two)


@pytest.mark.parametrize("norm", [-1.0, float("inf"), float("nan")])
def test_a_norm_to_clip_at_is_finite_and_at_least_0(norm):
    with pytest.raises(ValueError, match="clip_part_norm"):
        make_contract(clip_part_norm=norm)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b'{"layout": 1}', b"\xff"])
def test_other_json_is_no_contract(text):
    with pytest.raises(RemoteProtocolError, match="not a contract"):
        Contract.from_json(text)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("kept", torch.ones(2, 2, dtype=torch.float64))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_buffer("empty", torch.ones(0))


def test_persistent_number_buffers_are_laid_out():
    layout = BufferLayout.of(Net())
    assert layout.floats == (
        ("kept", (2, 2)),
        ("norm.running_mean", (2,)),
        ("norm.running_var", (2,)),
    )
    assert layout.integers == (("norm.num_batches_tracked", ()),)
    assert (layout.num_floats, layout.num_integers) == (8, 1)


def test_buffers_are_written_as_they_were_read():
    one, two = Net(), Net()
    one.norm(torch.randn(5, 2))
    layout = BufferLayout.of(one)
    layout.write_(two, *layout.read(one))
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, dict(two.named_buffers())[name])


def test_a_model_without_buffers_has_an_empty_layout():
    layout = BufferLayout.of(nn.Linear(2, 2))
    assert layout == BufferLayout()
    floats, integers = layout.read(nn.Linear(2, 2))
    assert (floats.numel(), integers.numel()) == (0, 0)
