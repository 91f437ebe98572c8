"""What workers tell the monitor of the steps they really do: our own loop's, and a script's."""

import time
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from distbelief.param_server.identity import Identity
from distbelief.param_server.report import REPORTS, UNKNOWN, WorkerReport
from distbelief.param_server.reporter import Reporter
from distbelief.workers import downpour as downpour_module
from distbelief.workers import session
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.loader import DataLoader
from distbelief.workers.worker import Worker
from tests.helpers.solo import Numbers, Script, linear
from tests.workers.jobs import RUN, TOKEN, Wire, control_of
from tests.workers.late import Late
from tests.workers.test_worker import Scene

ME = Identity(run=RUN, w="w0", inc=1, token=TOKEN)


class Mailbox:
    """Where reports go."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []

    def send(self, data: bytes) -> bool:
        report = REPORTS.decode(data)
        assert isinstance(report, WorkerReport)
        self.reports.append(report)
        return True

    def close(self) -> None: ...

    def column(self, name: str) -> list[Any]:
        return [value for report in self.reports for value in getattr(report, name)]


@pytest.fixture(params=["in place", "late"])
def _staging(request, monkeypatch) -> None:
    """Everything here holds on the CPU and on a device."""
    if request.param == "late":
        monkeypatch.setattr(downpour_module, "staging_of", lambda _: Late())


def train(downpour: DownpourConfig, every_s: float = 0.0, **config: Any) -> tuple[Mailbox, Scene]:
    """One worker; every_s: between two reports, the first of which is at once with 0."""
    scene, mailbox = Scene(epochs=2, downpour=downpour, **config), Mailbox()
    worker = Worker(
        scene.config,
        ME,
        scene.models[0],
        scene.contract,
        scene.split,
        control_of(scene.controller, scene._lock),
        lambda: Wire(scene.servers.handlers),
        reporter=Reporter(mailbox, ME, every_s),
    )
    worker.run()
    return mailbox, scene


def norms(mailbox: Mailbox) -> torch.Tensor:
    return torch.tensor(mailbox.column("grad_norm"))


POLICIES = [
    DownpourConfig(),
    DownpourConfig(overlap=True),
    DownpourConfig(n_push=3, n_fetch=2),
    DownpourConfig(fetch_policy="latest"),
]


@pytest.mark.usefixtures("_staging")
@pytest.mark.parametrize("downpour", POLICIES, ids=str)
@pytest.mark.parametrize("every_s", [0.0, 1e9], ids=["often", "at the end"])
def test_every_step_is_told_once_and_its_phases_are_parts_of_it(downpour, every_s):
    mailbox, scene = train(downpour, every_s)
    steps = mailbox.column("step_s")
    assert len(steps) == mailbox.reports[-1].num_steps
    assert sum(mailbox.column("samples")) == mailbox.reports[-1].num_samples == 2 * 96
    assert all(mailbox.column("has_loss"))
    phases = [mailbox.column(f"{name}_s") for name in ("data", "fetch", "compute", "push")]
    assert all(seconds >= 0 for column in phases for seconds in column)
    for step, *parts in zip(steps, *phases, strict=True):
        assert sum(parts) <= step * 1.02
    # The last pushes are answered between the last step and the end, in no step.
    assert sum(mailbox.column("has_push")) in range(len(scene.servers.pushes) - 2, 1000)
    assert set(mailbox.column("grad_norm")) == {UNKNOWN}
    assert [report.n for report in mailbox.reports] == list(range(1, len(mailbox.reports) + 1))


@pytest.mark.usefixtures("_staging")
@pytest.mark.parametrize("downpour", [DownpourConfig(), DownpourConfig(overlap=True)], ids=str)
def test_the_norm_is_that_of_what_was_pushed(downpour):
    mailbox, scene = train(downpour, log_grad_norm=True)
    pushed = torch.stack([grad.norm() for grad in scene.servers.grads])
    told = norms(mailbox)
    assert len(told) >= len(pushed) - 1  # the device may not have computed the last one
    torch.testing.assert_close(told, pushed[: len(told)])


@pytest.mark.usefixtures("_staging")
def test_the_norm_of_a_clipped_gradient_is_what_was_left_of_it():
    mailbox, _ = train(DownpourConfig(clip_norm=0.01), log_grad_norm=True)
    assert float(norms(mailbox).max()) <= 0.010001
    assert float(norms(mailbox).min()) > 0


class Sleepy(nn.Module):
    """Takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        out: torch.Tensor = self.linear(x)
        return out


def slow_run(**config: Any) -> Mailbox:
    """20 ms for each forward pass and for each message to the shard."""
    handlers: dict[str, Any] = {}

    def slow(peer, frames):
        time.sleep(0.02)
        return handlers["shard0"](peer, frames)

    scene, mailbox = Scene(make_model=Sleepy, epochs=1, **config), Mailbox()
    handlers.update(scene.servers.handlers)
    scene.servers.handlers["shard0"] = slow
    Worker(
        scene.config, ME, scene.models[0], scene.contract, scene.split,
        control_of(scene.controller, scene._lock), lambda: Wire(scene.servers.handlers),
        reporter=Reporter(mailbox, ME, 0.0),
    ).run()  # fmt: skip
    return mailbox


def test_a_wait_for_parameters_alone_is_no_push():
    mailbox = slow_run(downpour=DownpourConfig(n_push=2, n_fetch=1))
    columns = map(mailbox.column, ("has_push", "fetch_s", "push_s"))
    steps = list(zip(*columns, strict=True))
    assert {has_push for has_push, _, _ in steps} == {False, True}
    for has_push, fetch, push in steps:
        assert (push if has_push else fetch) >= 0.02


def test_the_time_of_a_step_is_where_it_was_spent():
    mailbox = slow_run()
    assert min(mailbox.column("compute_s")) >= 0.02
    assert min(mailbox.column("push_s")) >= 0.02
    trips = mailbox.column("trip_s")
    assert len(trips) >= len(mailbox.column("step_s"))
    assert min(trips) >= 0.0
    assert sum(report.sent_bytes for report in mailbox.reports) >= 12 * 4 * 21  # of 21 values


@pytest.fixture
def _no_session():
    session.set_current(None)
    yield
    session.set_current(None)


@pytest.mark.usefixtures("_no_session")
def test_a_script_s_steps_are_what_the_waits_leave():
    mailbox, ticks = Mailbox(), count(0.0, 10.0)
    with Script() as script:
        reporter = Reporter(mailbox, ME, 0.0, clock=lambda: next(ticks))
        script.be(reporter=reporter, log_grad_norm=True)
        model = linear(1, 1)
        optimizer = Downpour(model.parameters(), lr=1e-5)
        loader = DataLoader(Numbers(40), 4, shuffle=True)
        for batch in loader:
            script.now += 5.0  # the script thinks
            optimizer.zero_grad()
            loss = model(batch.float()[:, None]).mean()
            loss.backward()
            optimizer.step(partial(float, loss.detach()))
        script.sessions[0].end()
    report = mailbox.reports[-1]
    assert (report.num_steps, report.num_samples, report.device) == (10, 40, "cpu")
    assert mailbox.column("step_s") == [5.0] * 10
    parts = zip(*(mailbox.column(f"{p}_s") for p in ("data", "fetch", "compute", "push")))  # noqa: B905 - of unlike length is a failure below
    assert [sum(one) for one in parts] == pytest.approx([5.0] * 10)
    assert min(mailbox.column("compute_s")) > 4.0
    assert all(mailbox.column("has_loss"))
    assert all(mailbox.column("has_push"))
    assert min(mailbox.column("grad_norm")) > 0
