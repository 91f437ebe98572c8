"""The worker's loop against a real controller and real shards, in memory."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distbelief.controller import Controller
from distbelief.param_server.client import Identity
from distbelief.param_server.update import make_rule
from distbelief.workers.data import Images
from distbelief.workers.downpour import DownpourConfig
from distbelief.workers.lease import LeaseQueue, epoch_order
from distbelief.workers.worker import NonFiniteLoss, Worker, WorkerConfig, loss_of
from tests.workers.jobs import RUN, TOKEN, Servers, Wire, contract_of, control_of, serving


def images(num: int = 96) -> Images:
    """Three classes that a linear model can tell apart."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(num) % 3
    inputs = F.one_hot(targets, 6).float() * 2 + torch.randn(num, 6, generator=generator) / 4
    return Images(inputs, targets, 3)


class Scene:
    """A controller, shards, and workers of one model."""

    def __init__(
        self,
        make_model=lambda: nn.Linear(6, 3),
        workers: int = 1,
        epochs: int = 4,
        warm_start: int = 0,
        **config,
    ):
        self.images = images()
        self.models = []
        for _ in range(workers):
            torch.manual_seed(0)
            self.models.append(make_model())
        self.contract = contract_of(self.models[0], make_rule("momentum"), lr=0.05)
        self.servers = Servers(self.contract, 1, workers)
        queue = LeaseQueue(len(self.images), 20, epochs, warm_start)
        self.controller = Controller(RUN, TOKEN, queue, 1, epochs)
        self.controller.handle(serving(0), 0.0)
        self.config = WorkerConfig(**{"batch_size": 8, **config})
        self._lock = threading.Lock()

    def worker(self, index: int) -> Worker:
        return Worker(
            self.config,
            Identity(run=RUN, w=f"w{index}", inc=1, token=TOKEN),
            self.models[index],
            self.contract,
            self.images,
            control_of(self.controller, self._lock),
            lambda: Wire(self.servers.handlers),
        )

    def run(self) -> None:
        workers = [self.worker(index) for index in range(len(self.models))]
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    @property
    def samples_applied(self) -> int:
        return min(part.samples for part in self.servers.shards[0].parts.values())


def test_a_worker_trains_until_it_is_told_to_halt():
    scene = Scene(epochs=6)
    scene.worker(0).run()
    queue = scene.controller.queue
    assert queue.is_finished
    assert queue.done_samples == scene.samples_applied == 6 * 96
    outputs = scene.models[0](scene.images.inputs)
    assert float((outputs.argmax(1) == scene.images.targets).float().mean()) > 0.9
    assert scene.controller.mean_loss is not None
    assert scene.controller.mean_loss < 0.5
    assert scene.controller.updates == len(scene.servers.pushes)


@pytest.mark.parametrize(
    "downpour",
    [
        DownpourConfig(),
        DownpourConfig(n_push=3, n_fetch=2),
        DownpourConfig(fetch_policy="latest"),
        DownpourConfig(fetch_policy="latest", n_push=5, local_lr=0.01),
    ],
    ids=str,
)
def test_workers_together_account_for_every_sample(downpour):
    scene = Scene(workers=3, downpour=downpour)
    scene.run()
    assert scene.controller.queue.is_finished
    assert scene.controller.queue.done_samples == scene.samples_applied == 4 * 96
    assert scene.servers.samples_pushed == 4 * 96
    assert {push.w for push in scene.servers.pushes} <= {"w0", "w1", "w2"}


def test_the_last_batch_of_a_lease_may_be_shorter():
    scene = Scene(epochs=1)  # 96 samples in leases of 20, batches of 8
    scene.worker(0).run()
    assert [push.samples for push in scene.servers.pushes] == [8, 8, 4] * 4 + [8, 8]


def test_in_a_warm_start_one_worker_trains_alone():
    scene = Scene(workers=2, warm_start=96)
    scene.run()
    alone = 0
    for push in scene.servers.pushes:
        if push.w != scene.servers.pushes[0].w:
            break
        alone += push.samples
    assert alone >= 96
    assert scene.samples_applied == 4 * 96


def test_a_nan_loss_is_an_error_that_names_worker_and_step_and_pushes_nothing():
    scene = Scene()
    scene.images.inputs[scene_order(scene)[10]] = float("nan")  # in the second batch
    with pytest.raises(NonFiniteLoss, match=r"w0: the loss is nan at step 1, epoch 0, samples 8"):
        scene.worker(0).run()
    assert [push.samples for push in scene.servers.pushes] == [8]


def scene_order(scene: Scene) -> list[int]:
    return epoch_order(scene.config.seed, 0, len(scene.images)).tolist()


def test_an_error_of_the_model_passes_through_and_leaves_no_thread():
    class Broken(nn.Linear):
        def forward(self, _):
            raise RuntimeError("my own mistake")

    with pytest.raises(RuntimeError, match="my own mistake"):
        Scene(lambda: Broken(6, 3)).worker(0).run()


def test_a_worker_that_comes_too_late_ends_at_once():
    scene = Scene()
    scene.controller.queue.stop()
    scene.worker(0).run()
    assert scene.servers.pushes == []


def test_a_stranger_is_told_to_halt():
    scene = Scene()
    scene.controller._token = "another"
    scene.worker(0).run()
    assert scene.controller.num_strangers == 1
    assert scene.servers.shards[0].contract is None


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.norm(x))


def test_statistics_of_batch_norm_end_up_merged_on_the_shard():
    scene = Scene(Normed, workers=2, merge_every_steps=3)
    scene.images.inputs.add_(3)  # running means begin at 0
    scene.run()
    nothing = scene.contract.buffers.no_buffers()
    client = scene.servers.client("reader", inc=0)
    client.connect()
    merged = client.merge(0, *nothing)
    client.close()
    assert merged is not None
    floats, integers = merged
    mean, variance = floats[:6], floats[6:]
    # A tenth of the way with each batch: at least 12 batches lead from 0 to 0.72 of the mean.
    assert int(integers) >= 12
    assert ((mean > 1.5) & (mean < 3.6)).all()
    torch.testing.assert_close(variance, scene.images.inputs.var(0), atol=0.4, rtol=0)


def test_one_worker_keeps_its_own_statistics_to_the_bit():
    scene = Scene(Normed, epochs=1, merge_every_steps=5)
    scene.worker(0).run()
    merged = scene.servers.shards[0]._buffers.merged()
    assert merged is not None
    assert merged[0].equal(scene.contract.buffers.read(scene.models[0])[0])
    assert int(merged[1]) == len(scene.servers.pushes)


def test_a_model_with_its_own_loss_is_trained_on_that():
    class Own(nn.Linear):
        def loss(self, outputs, targets):
            return 3 * F.cross_entropy(outputs, targets)

    model, x, y = Own(6, 3), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    outputs = model(x)
    assert loss_of(model, outputs, y).equal(3 * F.cross_entropy(outputs, y))


def test_without_its_own_loss_a_model_is_trained_on_cross_entropy():
    model, x, y = nn.Linear(6, 3), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    assert loss_of(model, model(x), y).equal(F.cross_entropy(model(x), y))


def test_a_model_that_returns_a_tuple_needs_its_own_loss():
    class Pair(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"Pair returns a tuple: give it a method loss\(outputs"):
        loss_of(Pair(6, 3), (torch.ones(1), torch.ones(1)), torch.tensor([0]))


@pytest.mark.parametrize("given", [1.5, torch.ones(2)])
def test_a_loss_that_is_no_scalar_tensor_is_refused(given):
    class Own(nn.Linear):
        def loss(self, outputs, targets):
            return given

    with pytest.raises(ValueError, match=r"Own\.loss must return a scalar tensor"):
        loss_of(Own(6, 3), torch.ones(1, 3), torch.tensor([0]))


@pytest.mark.parametrize("name", ["batch_size", "merge_every_steps"])
def test_a_worker_needs_whole_batches(name):
    changed: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(WorkerConfig(), **changed)
