"""On a CUDA device: the same numbers, fixed addresses, and a training thread that never waits.

Stated rounding: as tests/integration/test_numerics.py. The shards apply the updates on the CPU,
whose kernels contract other products and sums than the device's.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distbelief.script  # noqa: F401 - sets the session of a script that is alone
from distbelief.launcher import launch
from distbelief.param_server.update import make_rule
from distbelief.workers import session
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.staging import Cuda
from tests.helpers.runs import Watch, tiny_job
from tests.workers.jobs import Servers, batches, contract_of, flat

pytestmark = pytest.mark.gpu

LR = 0.1
ROUNDING = 2e-6
STEPS = 12
Batch = tuple[Tensor, Tensor]

CONFIGS = {
    "overlap": DownpourConfig(overlap=True),
    "by itself": DownpourConfig(overlap=None),
    "fresh": DownpourConfig(),
}


def deep(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """11,210 parameters in 16 parts, which are several messages."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(20, 100), nn.Tanh(), nn.Linear(100, 80), nn.Tanh(), nn.Linear(80, 10)
    ).to("cuda", dtype)


def data(num: int = STEPS) -> list[Batch]:
    return [(x.cuda(), y.cuda()) for x, y in batches(num)]


def loss_on(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]).float(), batch[1])


def train(downpour: Downpour, model: nn.Module, batch: Batch, around=nullcontext) -> None:
    downpour.zero_grad()
    downpour.announce(4)
    with around():
        loss = loss_on(model, batch)
    downpour.watch(loss, lambda _: None)
    loss.backward()
    downpour.step(samples=4)


def train_plain(model: nn.Module, batches: list[Batch], around=nullcontext) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        with around():
            loss = loss_on(model, batch)
        loss.backward()
        optimizer.step()


@contextmanager
def scene(
    model: nn.Module, config: DownpourConfig | None = None, *, memory: bool = False
) -> Iterator[tuple[Servers, Downpour]]:
    servers = Servers(contract_of(model, make_rule("momentum"), lr=LR), memory=memory)
    try:
        with servers.worker(model, config) as downpour:
            yield servers, downpour
    finally:
        servers.close()


def same(model: nn.Module, plain: nn.Module, rounding: float = ROUNDING) -> None:
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        difference = float((ours - theirs).detach().abs().max())
        assert difference <= rounding * float(theirs.detach().abs().max())


def half() -> torch.autocast:
    return torch.autocast("cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_worker_equals_torch(config, memory):
    model, plain, start = deep(), deep(), deep()
    with scene(model, config, memory=memory) as (servers, downpour):
        for batch in data():
            train(downpour, model, batch)
        assert downpour.last_pushed is not None
        assert downpour.last_pushed.staleness == 0
        assert flat(model).cpu().equal(servers.values)
    train_plain(plain, data())
    same(model, plain)
    assert not flat(model).equal(flat(start))


@pytest.mark.parametrize("config", [{"n_push": 2, "n_fetch": 3}, {"fetch_policy": "latest"}])
def test_other_policies_end_with_what_the_shards_have(config):
    model = deep()
    with scene(model, DownpourConfig(local_lr=0.01, **config)) as (servers, downpour):
        for batch in data():
            train(downpour, model, batch)
        downpour.flush()
        assert servers.samples_pushed == 4 * STEPS
        assert flat(model).cpu().equal(servers.values)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_autocast_in_bfloat16_equals_torchs(config):
    model, plain = deep(), deep()
    with scene(model, config) as (_, downpour):
        for batch in data():
            train(downpour, model, batch, half)
    train_plain(plain, data(), half)
    # A rounding in float32 may turn one in bfloat16, 2**-8, now and then.
    same(model, plain, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_train_on_float32_masters(dtype):
    model = deep(dtype)
    with scene(model, CONFIGS["overlap"]) as (servers, downpour):
        before = servers.values
        for x, y in data():
            train(downpour, model, (x.to(dtype), y))
        assert not servers.values.equal(before)
        assert flat(model).cpu().equal(servers.values.to(dtype))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_nothing_changes_its_address(config):
    model, seen = deep(), set()
    with scene(model, config) as (_, downpour):
        for batch in data():
            train(downpour, model, batch)
            grads = [parameter.grad for parameter in model.parameters()]
            assert all(grad is not None and grad.is_cuda for grad in grads)
            seen.add(
                (
                    tuple(parameter.data_ptr() for parameter in model.parameters()),
                    tuple(grad.data_ptr() for grad in grads if grad is not None),
                )
            )
    assert len(seen) == 1


@pytest.mark.parametrize("memory", [False, True])
def test_the_vectors_of_the_host_are_pinned_as_long_as_it_lasts(memory):
    with scene(deep(), memory=memory) as (_, downpour):
        vectors = [
            downpour._accrued.host,
            downpour._current.values,
            downpour._next.values,
        ]
        assert all(vector.is_pinned() for vector in vectors)
        assert isinstance(downpour._staging, Cuda)
    assert not any(vector.is_pinned() for vector in vectors)


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(),
        DownpourConfig(fetch_policy="latest", local_lr=0.01),
        DownpourConfig(n_push=2, n_fetch=2, clip_norm=0.5),
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device(config):
    model, batches = deep(), data()
    with scene(model, config) as (_, downpour):
        for batch in batches[:4]:
            train(downpour, model, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[4:]:
                train(downpour, model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        downpour.flush()
        assert downpour.answered_samples == 4 * STEPS


class Bad(Exception):
    pass


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_of_a_step_whose_loss_is_refused_nothing_leaves(config):
    def check(loss: float) -> None:
        if loss != loss:
            raise Bad

    model, batches = deep(), data(3)
    with scene(model, config) as (servers, downpour):
        for batch in batches[:2]:
            train(downpour, model, batch)
        num_pushes = len(servers.pushes)
        downpour.zero_grad()
        loss = loss_on(model, batches[2]) * float("nan")
        downpour.watch(loss, check)
        loss.backward()
        with pytest.raises(Bad):
            downpour.step()
        assert len(servers.pushes) == num_pushes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_forward_and_backward_pass_in_cuda_graphs(config):
    """What a graph has recorded are addresses."""
    model, plain, all_data = deep(), deep(), data()
    with scene(model, config) as (_, downpour):
        graphed = torch.cuda.make_graphed_callables(model, (torch.randn(4, 20, device="cuda"),))
        assert isinstance(graphed, nn.Module)
        for batch in all_data:
            train(downpour, graphed, batch)
    train_plain(plain, all_data)
    same(model, plain)


@pytest.mark.parametrize("overflow_at", [None, 0, 3])
def test_loss_scaling_in_float16_equals_torchs(overflow_at):
    scales, models, skipped = [], [], 0
    for is_ours in (True, False):
        model = deep()
        optimizer: torch.optim.Optimizer
        if is_ours:
            session.set_current(None)
            optimizer = Downpour(model.parameters(), lr=LR, momentum=0.9)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for number, batch in enumerate(data(6)):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = loss_on(model, batch)
            if number == overflow_at:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if isinstance(optimizer, Downpour):
            skipped = 6 - optimizer.num_answered
            optimizer.close()
        scales.append(scaler.get_scale())
        models.append(model)
    session.set_current(None)
    assert skipped == (overflow_at is not None)
    assert scales[0] == scales[1]
    same(models[0], models[1], 1e-2)  # as for bfloat16


def test_clipping_between_backward_and_step_is_seen_with_overlap():
    session.set_current(None)
    model = deep()
    optimizer = Downpour(model.parameters(), lr=LR, overlap=True)
    optimizer.zero_grad()
    loss_on(model, data(1)[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.001)
    with pytest.raises(ValueError, match="was changed after it had left"):
        optimizer.step()
    optimizer.close()
    session.set_current(None)


COMPILED = """
import sys
import torch
from distbelief.workers.downpour import DownpourConfig
from tests.workers.test_cuda import data, deep, same, scene, train, train_plain

for overlap in (False, True):
    model, plain = deep(), deep()
    with scene(model, DownpourConfig(overlap=overlap)) as (_, downpour):
        ours = torch.compile(model, backend=sys.argv[1])
        for batch in data():
            train(downpour, ours, batch)
    train_plain(plain, data())
    same(model, plain)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
def test_a_compiled_model_trains_as_it_would_with_torchs_optimizer(backend, repo_root):
    """In a process of its own: the compiler leaves threads behind."""
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, backend],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "equal\n"


def test_two_processes_share_a_device(user_folder):
    result = launch(tiny_job(user_folder / "runs", device="cuda"), live=Watch())
    assert (result.exit, result.error) == ("done", None)
    assert result.worker_samples.keys() == {"w0", "w1"}
    assert sum(result.worker_samples.values()) == 2 * 1437
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.8
