"""Overlap in a loop of our own: parts leave while backward runs, and nothing comes out different.

Everything is held against torch to the bit, on the CPU and on a device whose copies come late.
"""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distbelief.param_server.layout import Group
from distbelief.param_server.update import SGD
from distbelief.workers import downpour as downpour_module
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.staging import InPlace
from tests.workers.jobs import PATIENCE_S, Servers, batches, contract_of, flat
from tests.workers.late import Late

LR = 0.1
OVERLAP = DownpourConfig(overlap=True)


@pytest.fixture(autouse=True, params=["in place", "late"])
def stagings(request, monkeypatch) -> list[Late | InPlace]:
    """Those that were made: on the CPU, or on a device."""
    made: list[Late | InPlace] = []

    def make(_):
        made.append(InPlace() if request.param == "in place" else Late())
        return made[-1]

    monkeypatch.setattr(downpour_module, "staging_of", make)
    return made


def deep() -> nn.Sequential:
    """4 layers, 1,870 parameters in 16 parts, which are 4 messages to one shard."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(),
        nn.Linear(20, 10),
    )  # fmt: skip


def loss_on(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(downpour: Downpour, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    downpour.zero_grad()
    downpour.announce(4)
    loss_on(model, batch).backward()
    downpour.step(samples=4)


def train_plain(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in data:
        optimizer.zero_grad()
        loss_on(model, batch).backward()
        optimizer.step()


@contextmanager
def scene(
    model: nn.Module, config: DownpourConfig = OVERLAP, num_shards: int = 1, *, memory: bool = False
) -> Iterator[tuple[Servers, Downpour]]:
    servers = Servers(contract_of(model, SGD(), lr=LR), num_shards, memory=memory)
    try:
        with servers.worker(model, config) as downpour:
            yield servers, downpour
    finally:
        servers.close()


class Gate(torch.autograd.Function):
    """Backward stops here until it is let through."""

    @staticmethod
    def forward(ctx, x, wait):
        ctx.wait = wait
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.wait()
        return grad, None


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("overlap", [False, None, True])
def test_one_worker_equals_torch_to_the_bit(overlap, num_shards, memory):
    model, plain, data = deep(), deep(), batches(8)
    with scene(model, DownpourConfig(overlap=overlap), num_shards, memory=memory) as (_, downpour):
        for batch in data:
            train(downpour, model, batch)
        assert downpour.answered_samples == 4 * 8
        assert downpour.last_pushed is not None
        assert downpour.last_pushed.staleness == 0
        assert not downpour.last_pushed.is_partial
    train_plain(plain, data)
    assert flat(model).equal(flat(plain))


def test_layers_near_the_loss_leave_first_and_while_backward_is_running():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = deep()
            self.wait = lambda: None

        def forward(self, x):
            head = Gate.apply(self.layers[0](x), lambda: self.wait())
            return self.layers[1:](head)

    model = Gated()
    with scene(model) as (servers, downpour):
        has_come = threading.Event()
        handle = servers.handlers["shard0"]

        def watch(peer, frames):
            reply = handle(peer, frames)
            if len(servers.pushes) == 3:
                has_come.set()
            return reply

        servers.handlers["shard0"] = watch

        def wait():
            """The first layer has no gradient yet; the three messages without it are applied."""
            assert has_come.wait(PATIENCE_S)
            assert {part.version for part in list(servers.shards[0].parts.values())[4:]} == {1}
            assert [push.part[0] for push in servers.pushes] == [12, 8, 4]

        model.wait = wait
        before = flat(model).clone()
        downpour.zero_grad()
        downpour.announce(4)
        loss_on(model, batches(1)[0]).backward()
        assert flat(model).equal(before)  # what came meanwhile waits for the end of the step
        downpour.step(samples=4)
        assert [push.part[0] for push in servers.pushes] == [12, 8, 4, 0]
        assert {push.samples for push in servers.pushes} == {4}
        assert flat(model).equal(servers.values)


def test_what_has_not_left_by_the_step_leaves_near_the_loss_first():
    model = deep()
    with scene(model) as (servers, downpour):
        downpour.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = flat(model)
        downpour.step()
        assert [push.part[0] for push in servers.pushes] == [12, 8, 4, 0]
        assert flat(model).equal(before - LR)


def test_by_itself_it_begins_with_the_second_step():
    model, early = deep(), []
    with scene(model, DownpourConfig(overlap=None)) as (_, downpour):
        for batch in batches(3):
            downpour.zero_grad()
            downpour.announce(4)
            loss_on(model, batch).backward()
            early.append(downpour._overlap is not None and downpour._overlap.is_open)
            downpour.step(samples=4)
    assert early == [False, True, True]


@pytest.mark.parametrize(
    "config", [{"clip_norm": 1.0}, {"n_push": 2}, {"n_fetch": 2}, {"fetch_policy": "latest"}]
)
def test_by_itself_it_does_not_where_it_may_not(config):
    model = deep()
    with scene(model, DownpourConfig(overlap=None, **config)) as (_, downpour):
        for batch in batches(3):
            train(downpour, model, batch)
        assert downpour._overlap is None


def test_by_itself_it_does_not_for_a_single_message():
    model = nn.Linear(20, 10)
    with scene(model, DownpourConfig(overlap=None)) as (_, downpour):
        for batch in batches(3):
            train(downpour, model, batch)
        assert downpour._overlap is None


class Recomputed(nn.Module):
    """One layer in two checkpointed pieces: its gradient comes in two pieces as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 20)
        self.again = nn.Linear(20, 20)
        self.wide = nn.Linear(20, 60)
        self.last = nn.Linear(60, 10)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.again, x, use_reentrant=True)
        return self.last(self.wide(x))


def recomputed() -> Recomputed:
    torch.manual_seed(4)
    return Recomputed()


def test_by_itself_it_does_not_where_gradients_come_in_pieces(caplog):
    model, plain, data = recomputed(), recomputed(), batches(4)
    with (
        caplog.at_level(logging.INFO),
        scene(model, DownpourConfig(overlap=None)) as (_, downpour),
    ):
        for batch in data:
            train(downpour, model, batch)
        assert downpour._overlap is None
    train_plain(plain, data)
    assert flat(model).equal(flat(plain))
    assert "some tensors get their gradient in several pieces" in caplog.text


def test_a_second_gradient_after_the_first_has_left_is_refused_by_name():
    model = deep()
    first, second = batches(2)
    with scene(model) as (_, downpour):
        downpour.zero_grad()
        loss_on(model, first).backward()
        with pytest.raises(ValueError, match=r"6\.\w+ got a second gradient .*train\.overlap"):
            loss_on(model, second).backward()


def test_a_second_gradient_before_the_first_has_left_is_added():
    """As where one backward pass reaches only some of the tensors of a message."""
    model, plain, batch = deep(), deep(), batches(1)[0]
    with scene(model) as (_, downpour):
        downpour.zero_grad()
        for one_model in (model, plain):
            one_model.get_parameter("0.bias").sum().backward()
            loss_on(one_model, batch).backward()
        downpour.step()
    torch.optim.SGD(plain.parameters(), lr=LR).step()
    assert flat(model).equal(flat(plain))


def test_a_tensor_without_a_gradient_rests():
    class Seldom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = deep()
            self.seldom = nn.Linear(20, 20)
            self.is_used = False

        def forward(self, x):
            return self.layers(self.seldom(x) if self.is_used else x)

    torch.manual_seed(0)
    model, plain = Seldom(), Seldom()
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, weight_decay=0.1)
    servers = Servers(contract_of(model, SGD(), groups=[Group(lr=LR, weight_decay=0.1)]))
    with servers.worker(model, OVERLAP) as downpour:
        for number, batch in enumerate(batches(4)):
            model.is_used = plain.is_used = number % 2 == 1
            train(downpour, model, batch)
            optimizer.zero_grad()
            loss_on(plain, batch).backward()
            optimizer.step()
            torch.testing.assert_close(flat(model), flat(plain), rtol=1e-6, atol=1e-8)


def test_after_a_backward_pass_that_failed_half_way_training_goes_on():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = deep()
            self.is_broken = False

        def forward(self, x):
            return self.layers[1:](Gate.apply(self.layers[0](x), self.fail))

        def fail(self):
            if self.is_broken:
                raise RuntimeError("out of memory")

    model, data = Broken(), batches(3)
    with scene(model) as (servers, downpour):
        train(downpour, model, data[0])
        first = servers.shards[0].parts[0].values.clone()
        model.is_broken = True
        downpour.zero_grad()
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_on(model, data[1]).backward()
        model.is_broken = False
        downpour.zero_grad()
        # What had left is applied, the rest of that step is not.
        assert servers.shards[0].parts[0].values.equal(first)
        assert {part.version for part in servers.shards[0].parts.values()} == {2}
        train(downpour, model, data[2])
        assert {part.version for part in servers.shards[0].parts.values()} == {3}
        assert flat(model).equal(servers.values)


class Bad(Exception):
    pass


def refuse(number: float) -> None:
    if not math.isfinite(number):
        raise Bad(f"the loss is {number}")


@pytest.mark.parametrize(
    "config",
    [
        OVERLAP,
        DownpourConfig(),
        DownpourConfig(n_push=2, n_fetch=2),
        DownpourConfig(fetch_policy="latest"),
    ],
    ids=["overlap", "fresh", "n_push", "latest"],
)
def test_of_a_step_whose_loss_a_check_refuses_nothing_leaves(config):
    model, data = deep(), batches(6)

    def step(downpour, batch, factor):
        downpour.zero_grad()
        loss = loss_on(model, batch) * factor
        reading = downpour.watch(loss, refuse)
        loss.backward()
        downpour.step()
        return reading

    with scene(model, config) as (servers, downpour):
        reading = step(downpour, data[0], 1.0)
        downpour.flush()
        assert reading.is_there
        assert reading.value > 0
        with pytest.raises(Bad, match="the loss is nan"):  # noqa: PT012 - in which step depends
            step(downpour, data[1], math.nan)
            downpour.flush()
        assert {push.seq for push in servers.pushes} == {1}
        assert servers.values.isfinite().all()


def test_parameters_keep_their_addresses_on_a_device(stagings):
    model, seen = deep(), set()
    with scene(model) as (_, downpour):
        for batch in batches(4):
            train(downpour, model, batch)
            seen.add(tuple(p.data_ptr() for p in model.parameters()))
            assert all(p.grad is not None for p in model.parameters())
    assert len(seen) == (2 if isinstance(stagings[0], InPlace) else 1)


def test_gradients_keep_their_addresses():
    model, seen = deep(), set()
    with scene(model) as (_, downpour):
        for batch in batches(4):
            train(downpour, model, batch)
            seen.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.grad is not None))
    assert len(seen) == 1


@pytest.mark.parametrize("config", [OVERLAP, DownpourConfig(fetch_policy="latest")], ids=str)
def test_a_push_in_shared_memory_is_a_header_alone(config):
    model, num_frames = deep(), set()
    with scene(model, config, memory=True) as (servers, downpour):
        handle = servers.handlers["shard0"]

        def watch(peer, frames):
            num_frames.add(len(frames))
            return handle(peer, frames)

        servers.handlers["shard0"] = watch
        for batch in batches(6):
            train(downpour, model, batch)
        downpour.flush()
        assert servers.samples_pushed >= 4 * 6
        assert flat(model).equal(servers.values)
    assert num_frames == {1}


def test_when_it_ends_it_has_let_go_of_the_device(stagings):
    with scene(deep()):
        pass
    assert stagings[0].is_in_place or stagings[0].is_closed


def test_what_goes_wrong_with_a_later_message_ends_the_push():
    model = deep()
    with scene(model) as (servers, downpour):
        client = downpour._comm.connect()
        send = client.send_push

        def fail(ticket, index, *rest):
            if index == 1:
                raise OSError("no more sockets")
            send(ticket, index, *rest)

        client.send_push = fail  # type: ignore[method-assign]  # breaks at the third message
        with pytest.raises(OSError, match="no more sockets"):
            train(downpour, model, batches(1)[0])
        assert [push.part[0] for push in servers.pushes] == [12, 8]
