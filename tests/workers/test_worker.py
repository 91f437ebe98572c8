"""The worker's loop against a real controller and real shards, in memory."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distbelief.controller.machine import Controller
from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.identity import Identity
from distbelief.param_server.report import REPORTS, WorkerReport
from distbelief.param_server.reporter import Reporter
from distbelief.param_server.update import make_rule
from distbelief.workers import downpour as downpour_module
from distbelief.workers.downpour import DownpourConfig
from distbelief.workers.embedded import Tensors, split_of
from distbelief.workers.lease import LeaseQueue
from distbelief.workers.notes import Beat, Denied, Next, Stepped
from distbelief.workers.order import epoch_order
from distbelief.workers.own import Rows
from distbelief.workers.split import Read
from distbelief.workers.worker import NonFiniteLoss, Worker, WorkerConfig, loss_of
from tests.workers.jobs import RUN, TOKEN, Servers, Wire, contract_of, control_of, serving
from tests.workers.late import Late


@pytest.fixture(autouse=True, params=["in place", "late"])
def _staging(request, monkeypatch) -> None:
    """Everything here holds on the CPU and on a device."""
    if request.param == "late":
        monkeypatch.setattr(downpour_module, "staging_of", lambda _: Late())


def images(num: int = 96) -> Tensors:
    """Three classes that a linear model can tell apart."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(num) % 3
    inputs = F.one_hot(targets, 6).float() * 2 + torch.randn(num, 6, generator=generator) / 4
    return Tensors(inputs, targets)


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
        self.split = split_of(self.images.inputs, self.images.targets, 3, "train")
        self.models = []
        for _ in range(workers):
            torch.manual_seed(0)
            self.models.append(make_model())
        self.contract = contract_of(self.models[0], make_rule("momentum"), lr=0.05)
        self.servers = Servers(self.contract, 1, workers)
        queue = LeaseQueue(len(self.images), 20, epochs, warm_start)
        self.controller = Controller(
            RUN, TOKEN, queue, 1, epochs, num_workers=workers, digest=self.split.digest
        )
        self.controller.handle(serving(0), 0.0)
        self.config = WorkerConfig(**{"batch_size": 8, **config})
        self._lock = threading.Lock()

    def worker(self, index: int) -> Worker:
        return Worker(
            self.config,
            Identity(run=RUN, w=f"w{index}", inc=1, token=TOKEN),
            self.models[index],
            self.contract,
            self.split,
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
    assert scene.controller.pace.mean_loss is not None
    assert scene.controller.pace.mean_loss < 0.5
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


@pytest.mark.parametrize(
    "downpour",
    [
        DownpourConfig(),
        DownpourConfig(overlap=None),
        DownpourConfig(overlap=True),
        DownpourConfig(fetch_policy="latest"),
    ],
    ids=str,
)
def test_the_controller_is_told_every_loss_once(downpour):
    """Where it is known late, the note of a later step brings it."""
    scene = Scene(wide, epochs=2, downpour=downpour)
    told = []
    handle = scene.controller.handle

    def watch(note, now, speaker=None):
        if isinstance(note, Stepped):
            told.append((note.samples, note.loss))
        return handle(note, now, speaker)

    scene.controller.handle = watch  # type: ignore[method-assign]  # a listener on the line
    scene.worker(0).run()
    steps = [(samples, loss) for samples, loss in told if samples]
    assert [samples for samples, _ in steps] == [8, 8, 4] * 4 + [8, 8] + [8, 8, 4] * 4 + [8, 8]
    assert all(loss > 0 for _, loss in steps)
    assert scene.samples_applied == 2 * 96


def wide() -> nn.Module:
    """1,219 parameters: several messages."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 121), nn.Tanh(), nn.Linear(121, 3, bias=False), nn.Tanh())


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
    scene.controller.token = "another"
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


class Holed:
    """Samples of which some cannot be read."""

    def __init__(self, tensors: Tensors, bad: set[int]) -> None:
        self.tensors = tensors
        self.bad = bad

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, indices, epoch=0) -> Read:
        good = [index for index in indices if index not in self.bad]
        bad = tuple((f"file{index}", "torn") for index in indices if index in self.bad)
        if not good:
            return Read(None, None, 0, bad)
        return replace(self.tensors.read(good), bad=bad)

    def close(self) -> None:
        pass


def holed(scene: Scene, bad: set[int]) -> Scene:
    scene.split = replace(scene.split, samples=Holed(scene.images, bad))
    return scene


@pytest.mark.parametrize("num_loaders", [0, 2])
@pytest.mark.parametrize(
    "downpour",
    [DownpourConfig(), DownpourConfig(n_push=3, n_fetch=2), DownpourConfig(fetch_policy="latest")],
    ids=["fresh", "accrued", "latest"],
)
def test_bad_samples_are_left_out_counted_and_named(downpour, num_loaders):
    bad = {0, 7, 8, 50, 95}
    workers = 1 if num_loaders else 2  # a fork of a process with two busy threads is no test
    scene = holed(Scene(workers=workers, downpour=downpour, num_loaders=num_loaders), bad)
    scene.run()
    assert scene.controller.queue.is_finished
    assert scene.controller.queue.done_samples == 4 * 96
    assert scene.samples_applied == scene.servers.samples_pushed == 4 * 91
    assert scene.controller.bad_samples == {f"file{index}": "torn" for index in bad}


def test_a_batch_of_bad_samples_alone_is_not_trained_on_but_counted():
    scene = Scene(epochs=1)
    holed(scene, set(scene_order(scene)[8:16]))  # the second batch of the first lease
    scene.worker(0).run()
    assert [push.samples for push in scene.servers.pushes] == [8, 4] + [8, 8, 4] * 3 + [8, 8]
    assert scene.controller.queue.done_samples == 96


def test_a_sample_that_is_left_alone_by_bad_ones_is_not_trained_on():
    scene = Scene(lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), epochs=1)
    holed(scene, set(scene_order(scene)[9:16]))
    scene.worker(0).run()
    assert [push.samples for push in scene.servers.pushes][:3] == [8, 4, 8]
    assert scene.controller.queue.done_samples == 96


def test_all_samples_bad_ends_all_the_same():
    scene = holed(Scene(epochs=1), set(range(96)))
    scene.worker(0).run()
    assert scene.controller.queue.is_finished
    assert scene.servers.pushes == []
    assert len(scene.controller.bad_samples) == 96


def test_a_bad_sample_is_counted_only_when_the_batches_before_it_were_answered():
    """A lost worker's lease is given on from where it was done: nothing before may be open."""
    scene = Scene(epochs=1, downpour=DownpourConfig(n_push=100, n_fetch=100))
    holed(scene, set(scene_order(scene)[16:20]))
    told = []
    handle = scene.controller.handle

    def watch(note, now, speaker=None):
        if isinstance(note, Stepped):
            told.append((note.answered + note.left_out, scene.servers.samples_pushed))
        return handle(note, now, speaker)

    scene.controller.handle = watch  # type: ignore[method-assign]  # a listener on the line
    scene.worker(0).run()
    # The first push carries 8 samples; the next 80 and the 4 bad ones wait for the last.
    assert told[-1] == (96, 92)
    assert all(answered <= pushed for answered, pushed in told if pushed < 92)


def test_loader_processes_change_nothing_in_the_order_of_the_data():
    pushes = []
    for num_loaders in (0, 1, 2):
        scene = Scene(epochs=2, num_loaders=num_loaders)
        scene.worker(0).run()
        pushes.append(torch.stack([grad.clone() for grad in scene.servers.grads]))
    assert pushes[0].equal(pushes[1])
    assert pushes[0].equal(pushes[2])


def test_structures_of_tensors_go_to_a_model_as_they_are():
    class Sum(nn.Linear):
        def forward(self, x):
            return super().forward(x["left"] + x["right"][0])

        def loss(self, outputs, targets):
            return F.cross_entropy(outputs, targets["class"])

    scene = Scene(lambda: Sum(6, 3), epochs=1)
    x, y = scene.images.inputs, scene.images.targets
    rows = [({"left": a / 2, "right": (a / 2,)}, {"class": b}) for a, b in zip(x, y, strict=True)]
    scene.split = replace(scene.split, samples=Rows(rows))
    scene.worker(0).run()
    assert scene.samples_applied == 96


def test_a_worker_waits_while_others_hold_the_last_leases():
    """Neither may keep a half-read batch while the other waits: both would wait for ever."""
    scene = Scene(workers=2, epochs=2, num_loaders=0, downpour=DownpourConfig(n_push=50))
    scene.run()
    assert scene.controller.queue.is_finished
    assert scene.samples_applied == 2 * 96


def test_what_the_controller_denies_is_an_error():
    scene = Scene()
    handle = scene.controller.handle

    def deny(note, now, speaker=None):
        return Denied(text="no, because") if isinstance(note, Next) else handle(note, now)

    scene.controller.handle = deny  # type: ignore[method-assign]  # an answer of its own
    with pytest.raises(DistBeliefError, match="no, because"):
        scene.worker(0).run()


def test_the_digest_is_told_before_anything_is_trained():
    scene = Scene()
    scene.split = replace(scene.split, digest="another")
    scene.worker(0).run()
    assert scene.servers.pushes == []
    error = scene.controller.first_error
    assert error is not None
    assert "sees other data than the launcher" in error[2]


def test_a_worker_has_no_negative_number_of_loaders():
    with pytest.raises(ValueError, match="num_loaders must be at least 0, got -1"):
        WorkerConfig(num_loaders=-1)


@pytest.mark.parametrize("name", ["batch_size", "merge_every_steps"])
def test_a_worker_needs_whole_batches(name):
    changed: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(WorkerConfig(), **changed)


def test_a_drained_worker_pushes_what_has_accrued_and_gives_the_rest_back():
    scene = Scene(downpour=DownpourConfig(n_push=4), epochs=1)
    worker = scene.worker(0)
    worker._is_leaving = lambda: worker._samples >= 24  # in the middle of the second lease
    worker.run()
    assert worker.is_drained
    assert [push.samples for push in scene.servers.pushes] == [8, 20]  # 3 steps of 4
    assert scene.controller.is_leaving("w0")
    assert scene.controller.queue.done_samples == scene.samples_applied == 28
    assert scene.controller.queue.give_back("w0") == 12


@pytest.mark.parametrize("when", ["before it has joined", "while it trains"])
def test_a_worker_that_the_controller_drains_leaves(when):
    scene = Scene(epochs=1000)
    if when == "before it has joined":
        scene.controller.drain("w0")
    else:
        handle = scene.controller.handle

        def watch(note, now, speaker=None):
            if scene.controller.queue.done_samples >= 20:
                scene.controller.drain("w0")
            return handle(note, now, speaker)

        scene.controller.handle = watch  # type: ignore[method-assign]  # a listener on the line
    worker = scene.worker(0)
    worker.run()
    assert worker.is_drained is (when == "while it trains")
    assert scene.controller.queue.done_samples < 200


def test_a_worker_asks_between_two_steps_whether_it_is_to_leave():
    """Also in a long lease: not only with the next one."""
    scene = Scene(epochs=1, batch_size=1)
    now = [0.0]

    def clock():
        now[0] += 0.2
        return now[0]

    worker = scene.worker(0)
    worker._clock, worker._beaten_at = clock, 0.0
    handle = scene.controller.handle
    beats: list[Beat] = []

    def watch(note, now, speaker=None):
        if isinstance(note, Beat):
            beats.append(note)
            scene.controller.drain("w0")
        return handle(note, now, speaker)

    scene.controller.handle = watch  # type: ignore[method-assign]  # a listener on the line
    worker.run()
    assert worker.is_drained
    assert len(beats) == 1
    assert scene.samples_applied == 2  # the second look is 0.5 s after the first


class Ear:
    """What a worker's reports would bring to the monitor."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []

    def send(self, data: bytes) -> bool:
        report = REPORTS.decode(data)
        assert isinstance(report, WorkerReport)
        self.reports.append(report)
        return True

    def close(self) -> None:
        pass


class Forgetful(nn.Module):
    """Batch normalisation and dropout: what a second pass over a batch could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.drop(self.norm(x)))


def trained(share: float, overlap: bool | None) -> tuple[Scene, list[WorkerReport]]:
    """A run of one worker, and its reports: one a step."""
    scene, ear = Scene(Forgetful, epochs=2, meter=share), Ear()
    scene.config = replace(scene.config, downpour=DownpourConfig(overlap=overlap))
    worker = scene.worker(0)
    worker._reporter = Reporter(ear, worker._identity, every_s=0.0)
    torch.manual_seed(5)  # of dropout
    worker.run()
    assert scene.controller.queue.is_finished
    return scene, ear.reports


@pytest.mark.parametrize("overlap", [None, True], ids=["plain", "overlap"])
def test_the_meter_changes_no_bit_of_what_is_trained_and_reports_what_it_saw(overlap):
    without, silent = trained(0.0, overlap)
    with_it, told = trained(1.0, overlap)
    assert with_it.servers.values.equal(without.servers.values)
    for one, other in zip(
        with_it.models[0].state_dict().values(),
        without.models[0].state_dict().values(),
        strict=True,
    ):
        assert one.equal(other)
    assert [m for report in silent for m in report.meter_cosine] == []
    columns = [
        [value for report in told for value in getattr(report, f"meter_{name}")]
        for name in ("staleness", "cosine", "gap", "rate")
    ]
    num_steps = len(with_it.servers.pushes)
    assert [len(column) for column in columns] == [num_steps] * 4
    staleness, cosine, gap, rate = columns
    assert staleness == [1] * num_steps  # alone: its own update and no other's
    assert all(-1 <= value <= 1 for value in cosine)
    assert sum(cosine) / num_steps > 0.5  # one step of a smooth loss: it still points there
    assert sum(gap) < 0  # and that step was of use to its batch
    assert any(rate)
