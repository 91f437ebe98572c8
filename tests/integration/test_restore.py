"""A shard's snapshot, restored by a new server, goes on as if it had never stopped."""

import copy

import pytest
import torch

from distbelief.param_server.client import Fetched
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import Group, layout_of, trainable
from distbelief.param_server.update import make_rule
from tests.helpers.cluster import cluster


def push_all(client, contract, seqs, state):
    """Push recorded gradients; `state` is the worker's copy, kept over restarts."""
    now, then = state
    absent = contract.layout.absent_masks([])
    for seq in seqs:
        grad = torch.randn(contract.layout.total, generator=torch.Generator().manual_seed(seq))
        client.wait(client.start_push(grad, 10 + seq, now, absent, then))
        now, then = then, now
    return now, then


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_a_restored_snapshot_continues_at_the_same_versions_and_sample_counts(tmp_path, rule):
    module = torch.nn.Linear(40, 31)
    named = trainable(module.named_parameters())
    contract = Contract(layout_of(named, [Group(lr=0.01, weight_decay=0.1)]), make_rule(rule))
    first = torch.randn(contract.layout.total)

    def begin(shards):
        client = shards.client("w0", contract)
        client.connect()
        client.initialise(first)
        state = Fetched(contract.layout), Fetched(contract.layout)
        client.fetch(state[0])
        return client, state

    with cluster(2) as shards:
        client, state = begin(shards)
        unbroken, _ = push_all(client, contract, range(1, 21), state)
        client.close()

    with cluster(2, folder=tmp_path, epoch=1) as shards:
        client, state = begin(shards)
        before, then = push_all(client, contract, range(1, 9), state)
        client.close()
    with cluster(2, folder=tmp_path, epoch=2) as shards:
        assert all(shard.is_ready for shard in shards.shards)
        client = shards.client("w0", contract, inc=2)
        client.connect()
        after = Fetched(contract.layout)
        client.fetch(after)
        assert after.version == before.version == [8] * len(contract.layout.parts)
        assert after.samples == before.samples == [sum(range(11, 19))] * len(before.samples)
        assert torch.equal(after.values, before.values)
        finished, _ = push_all(client, contract, range(9, 21), (copy.copy(after), then))
        client.close()
    assert finished.version == unbroken.version
    assert finished.samples == unbroken.samples
    assert torch.equal(finished.values, unbroken.values)
