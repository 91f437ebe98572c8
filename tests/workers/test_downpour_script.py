"""Downpour as a script sees it: alone, with the semantics of torch.optim."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief.script  # noqa: F401 - sets the session of a script that is alone
from distbelief.param_server.schedule import Schedule
from distbelief.workers import session
from distbelief.workers.downpour import Downpour
from distbelief.workers.loader import DataLoader
from tests.helpers.solo import Script, linear
from tests.workers.jobs import batches, flat

LR = 0.1
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    session.set_current(None)
    yield
    session.set_current(None)


def loss_on(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(optimizer: torch.optim.Optimizer, model: nn.Module, data: list[Batch]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_on(model, batch).backward()
        optimizer.step()


def same(model: nn.Module, plain: nn.Module, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(flat(model), flat(plain), rtol=tolerance, atol=tolerance)


class Both:
    """A model with Downpour and its twin with an optimizer of torch, and one way to train them."""

    def __init__(
        self, make_model: Callable[[], nn.Module] = linear, weight_decay: float = 0.0
    ) -> None:
        self.model, self.plain = make_model(), make_model()
        options = {"lr": LR, "momentum": 0.9, "weight_decay": weight_decay}
        self.ours = Downpour(self.model.parameters(), **options)  # type: ignore[arg-type]
        self.theirs = torch.optim.SGD(self.plain.parameters(), **options)  # type: ignore[arg-type]

    def each(self, train: Callable[[nn.Module, torch.optim.Optimizer], object]) -> None:
        train(self.model, self.ours)
        train(self.plain, self.theirs)

    def same(self) -> None:
        same(self.model, self.plain, 2e-6)


RULES = [
    ({}, torch.optim.SGD, {}, 0.0),
    ({"momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}, 2e-6),
    ({"momentum": 0.0}, torch.optim.SGD, {}, 0.0),
    (
        {"rule": "nesterov", "momentum": 0.8, "weight_decay": 0.01},
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        2e-6,
    ),
    ({"rule": "adagrad"}, torch.optim.Adagrad, {}, 2e-6),
    (
        {"rule": "adam", "beta1": 0.8, "beta2": 0.9},
        torch.optim.Adam,
        {"betas": (0.8, 0.9)},
        2e-6,
    ),
    (
        {"rule": "adamw", "weight_decay": 0.1, "eps": 1e-6},
        torch.optim.AdamW,
        {"weight_decay": 0.1, "eps": 1e-6},
        2e-6,
    ),
]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("ours", "optimizer", "theirs", "tolerance"), RULES)
def test_steps_equal_torchs(ours, optimizer, theirs, tolerance, joined):
    model, plain = linear(), linear()
    with Script() as script:
        if joined:
            script.be()
        train(Downpour(model.parameters(), lr=LR, **ours), model, batches(12))
        train(optimizer(plain.parameters(), lr=LR, **theirs), plain, batches(12))
        same(model, plain, tolerance)
        assert not flat(plain).equal(flat(linear()))
        if joined:
            assert script.values.equal(flat(model))


def test_alone_it_says_once_that_it_is_alone(capfd):
    Downpour(linear().parameters(), lr=LR)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("distbelief launch SCRIPT --workers 4") == 1


# Gradients


def test_gradients_of_several_backward_passes_add_up():
    both = Both()

    def train(model, optimizer):
        for number, batch in enumerate(batches(12)):
            (loss_on(model, batch) / 3).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    both.each(train)
    both.same()
    assert both.ours.num_steps == 4


def test_without_zero_grad_gradients_go_on_adding_up():
    both = Both()

    def train(model, optimizer):
        for batch in batches(4):
            loss_on(model, batch).backward()
            optimizer.step()

    both.each(train)
    both.same()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of_model", [True, False])
def test_a_gradient_of_none_rests_and_one_of_zeros_decays(set_to_none, of_model):
    def make():
        return nn.ModuleDict({"even": linear(), "odd": linear()})

    both = Both(make, weight_decay=0.1)

    def train(model, optimizer):
        for number, batch in enumerate(batches(6)):
            (model if of_model else optimizer).zero_grad(set_to_none=set_to_none)
            loss_on(model["odd" if number % 2 else "even"], batch).backward()
            optimizer.step()

    both.each(train)
    both.same()


def test_gradients_that_are_clipped_between_backward_and_step():
    both = Both()

    def train(model, optimizer):
        for batch in batches(6):
            optimizer.zero_grad()
            loss_on(model, batch).backward()
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
            optimizer.step()

    both.each(train)
    both.same()


def test_clip_norm_is_that_of_the_whole_gradient():
    model, plain = linear(), linear()
    train(Downpour(model.parameters(), lr=LR, clip_norm=0.1), model, batches(6))
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_on(plain, batch).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    same(model, plain, 2e-6)


def assign(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad


def write(parameter: nn.Parameter, grad: Tensor) -> None:
    """As a script that keeps the memory of its gradients."""
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad.copy_(grad)


@pytest.mark.parametrize("put", [assign, write])
def test_gradients_that_the_script_itself_computes_count(put):
    both = Both()

    def train(model, optimizer):
        for batch in batches(4):
            optimizer.zero_grad()
            grads = torch.autograd.grad(loss_on(model, batch), list(model.parameters()))
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                put(parameter, grad)
            optimizer.step()

    both.each(train)
    both.same()


def test_a_gradient_that_left_the_arena_is_brought_back():
    both = Both()

    def train(model, optimizer):
        for batch in batches(4):
            model.zero_grad()  # the module's own puts None in its place
            loss_on(model, batch).backward()
            model.weight.grad = model.weight.grad * 0.5
            optimizer.step()

    both.each(train)
    both.same()


def test_a_gradient_with_a_graph_of_its_own():
    both = Both()

    def train(model, optimizer):
        for batch in batches(3):
            optimizer.zero_grad()
            with warnings.catch_warnings():  # torch warns of the cycle; zero_grad breaks it
                warnings.simplefilter("ignore", UserWarning)
                loss_on(model, batch).backward(create_graph=True)
            optimizer.step()

    both.each(train)
    both.same()


def test_a_penalty_on_the_gradient():
    both = Both()

    def train(model, optimizer):
        for batch in batches(4):
            optimizer.zero_grad()
            loss = loss_on(model, batch)
            grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + sum(grad.square().sum() for grad in grads)).backward()
            optimizer.step()

    both.each(train)
    both.same()


def test_a_parameter_in_two_modules_is_trained_once():
    def make():
        first, second = linear(8, 8), linear(8, 8)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second)

    both = Both(make)
    both.each(lambda model, optimizer: train(optimizer, model, batches(5, 8, 8)))
    both.same()
    assert both.model[0].weight is both.model[2].weight  # type: ignore[index]


def test_frozen_parameters_stay_and_one_that_is_frozen_later_rests():
    def make():
        model = nn.Sequential(linear(20, 8), nn.Tanh(), linear(8, 8), linear(8, 10))
        model[0].requires_grad_(False)
        return model

    both = Both(make)

    def run(model, optimizer):
        train(optimizer, model, batches(3))
        model[2].requires_grad_(False)
        train(optimizer, model, batches(3))
        model[2].requires_grad_(True)
        train(optimizer, model, batches(3))

    both.each(run)
    both.same()


def test_a_parameter_that_was_frozen_and_is_not_any_more_is_refused():
    """torch would begin to train it; the shards have no place for it."""
    model = nn.Sequential(linear(20, 8), linear(8, 10))
    model[0].requires_grad_(False)
    optimizer = Downpour(model.named_parameters(), lr=LR)
    train(optimizer, model, batches(1))
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0.weight \[8, 20\] was frozen when Downpour was made"):
        train(optimizer, model, batches(1))


def test_half_precision_parameters_train_on_float32_masters():
    model = linear().bfloat16()
    start = flat(model).clone()
    optimizer = Downpour(model.parameters(), lr=1e-4)
    for x, y in batches(60):
        optimizer.zero_grad()
        loss_on(model, (x.bfloat16(), y.bfloat16())).backward()
        optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    # One such step vanishes in bfloat16; sixty of them do not.
    assert not flat(model).equal(start)


def test_a_closure_is_called_with_gradients_and_gives_the_loss():
    both = Both()
    losses: dict[bool, list[float]] = {True: [], False: []}

    def train(model, optimizer):
        for batch in batches(4):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_on(model, batch)
                loss.backward()
                return loss

            with torch.no_grad():
                loss = optimizer.step(closure)
            losses[optimizer is both.ours].append(float(loss.detach()))

    both.each(train)
    both.same()
    assert losses[True] == losses[False]
    assert both.ours.last_loss == losses[True][-1]


def test_hooks_of_steps_run():
    model, calls = linear(), []
    optimizer = Downpour(model.parameters(), lr=LR)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, model, batches(1))
    assert calls == ["before", "after"]


# Loss scaling


def scaled(model, optimizer, data, *, unscale: bool, overflow_at: int | None = None):
    """Steps under a GradScaler; at one of them the loss is too large for its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, batch in enumerate(data):
        optimizer.zero_grad()
        loss = loss_on(model, batch)
        if number == overflow_at:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_at", [None, 0, 2])
def test_loss_scaling_equals_torchs(unscale, overflow_at):
    both, scales = Both(), []
    both.each(
        lambda model, optimizer: scales.append(
            scaled(model, optimizer, batches(5), unscale=unscale, overflow_at=overflow_at)
        )
    )
    both.same()
    assert scales[0] == scales[1]
    assert both.ours.num_steps == both.ours.num_answered == 5 - (overflow_at is not None)


def test_an_overflow_pushes_nothing_and_counts_as_skipped():
    x, y = (torch.cat(part) for part in zip(*batches(5), strict=True))
    model = linear()
    with Script() as script:
        script.be()
        optimizer = Downpour(model.parameters(), lr=LR)
        loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
        scaled(model, optimizer, loader, unscale=False, overflow_at=2)
        optimizer.zero_grad()
        assert (optimizer.answered_samples, optimizer.skipped_samples) == (16, 4)
        assert {part.version for part in script.shard.parts.values()} == {4}
        script.sessions[0].end()
        assert script.controller.skipped_samples == 4
        assert script.queue.done_samples == 20


# torch.compile

COMPILED = """
import sys
import torch
from distbelief import Downpour
from distbelief.workers import session
from tests.helpers.solo import linear
from tests.workers.jobs import batches, flat
from tests.workers.test_downpour_script import LR, train

for overlap in (False, True):
    session.set_current(None)
    model, plain = linear(), linear()
    ours, theirs = (torch.compile(one, backend=sys.argv[1]) for one in (model, plain))
    optimizer = Downpour(ours.named_parameters(), lr=LR, momentum=0.9, overlap=overlap)
    train(optimizer, ours, batches(6))
    train(torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9), theirs, batches(6))
    torch.testing.assert_close(flat(model), flat(plain), rtol=2e-6, atol=2e-6)
    assert not flat(model).equal(flat(linear()))
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_as_it_would_with_torchs_optimizer(backend, repo_root, tmp_path):
    """In a process of its own: the compiler leaves threads behind."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, backend],
        cwd=repo_root,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "equal\n"


# Overlap


def test_overlap_computes_the_same():
    both = Both()
    model = linear()
    session.set_current(None)
    optimizer = Downpour(model.parameters(), lr=LR, momentum=0.9, overlap=True)
    train(optimizer, model, batches(6))
    both.each(lambda model, optimizer: train(optimizer, model, batches(6)))
    same(model, both.model)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_overlap_bears_both_kinds_of_zero_grad(set_to_none):
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR, overlap=True)
    for batch in batches(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_on(model, batch).backward()
        optimizer.step()
    assert optimizer.num_answered == 3


def test_overlap_refuses_a_second_backward_pass():
    model, (first, second) = linear(), batches(2)
    optimizer = Downpour(model.named_parameters(), lr=LR, overlap=True)
    optimizer.zero_grad()
    loss_on(model, first).backward()
    with pytest.raises(ValueError, match=r"got a second gradient .* overlap=False"):
        loss_on(model, second).backward()


def test_overlap_refuses_clipping():
    model = linear()
    optimizer = Downpour(model.named_parameters(), lr=LR, overlap=True)
    optimizer.zero_grad()
    loss_on(model, batches(1)[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(ValueError, match=r"was changed after it had left.*overlap=False"):
        optimizer.step()


# Groups, schedulers, state


def test_groups_keep_rates_and_decays_of_their_own():
    model, plain = linear(), linear()

    def groups(of):
        return [
            {"params": [of.weight], "lr": 0.05, "weight_decay": 0.1},
            {"params": [("bias", of.bias)]},
        ]

    train(Downpour(groups(model), lr=LR, momentum=0.9), model, batches(6))
    theirs: list[dict[str, Any]] = [
        {"params": [plain.weight], "lr": 0.05, "weight_decay": 0.1},
        {"params": [plain.bias]},
    ]
    train(torch.optim.SGD(theirs, lr=LR, momentum=0.9), plain, batches(6))
    # Not to the bit: how the ends of a vector are summed depends on where it lies in memory.
    same(model, plain, 1e-6)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "lr",
            0.05,
            r"changed from 0.1 to 0.05 on this worker.*schedule=.*take away the scheduler",
        ),
        ("weight_decay", 0.5, r"a parameter group was changed on this worker, from .*0.5"),
    ],
)
def test_a_change_of_a_group_is_refused_before_anything_is_pushed(key, value, text):
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=text):
        train(optimizer, model, batches(1))
    assert optimizer.num_answered == 0


def test_a_scheduler_that_changes_nothing_is_put_up_with():
    """Hugging Face's Trainer has one of these for lr_scheduler_type="constant"."""
    both = Both()

    def train(model, optimizer):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        for batch in batches(4):
            optimizer.zero_grad()
            loss_on(model, batch).backward()
            optimizer.step()
            scheduler.step()
        assert scheduler.get_last_lr() == [LR]

    both.each(train)
    both.same()


def test_a_scheduler_that_does_is_refused():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, model, batches(1))
    scheduler.step()
    with pytest.raises(ValueError, match=r"schedule="):
        train(optimizer, model, batches(1))


def test_a_schedule_counts_the_samples_of_the_loader():
    x, y = (torch.cat(part) for part in zip(*batches(10), strict=True))
    model, plain = linear(), linear()
    optimizer = Downpour(
        model.parameters(), lr=LR, schedule=Schedule(kind="step", every=20, gamma=0.1)
    )
    torch.manual_seed(3)
    for batch in DataLoader(TensorDataset(x, y), 4, shuffle=True):
        train(optimizer, model, [batch])
    torch.manual_seed(3)
    theirs = torch.optim.SGD(plain.parameters(), lr=LR)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        TensorDataset(x, y), 4, shuffle=True
    )
    for number, batch in enumerate(loader):
        theirs.param_groups[0]["lr"] = LR if number < 5 else LR * 0.1
        train(theirs, plain, [batch])
    same(model, plain, 1e-7)


def test_the_samples_of_a_step_are_those_of_its_batches():
    model, counts = linear(), []
    optimizer = Downpour(model.parameters(), lr=LR)
    x, y = (torch.cat(part) for part in zip(*batches(5), strict=True))
    for number, batch in enumerate(DataLoader(TensorDataset(x, y), 4, shuffle=True)):
        loss_on(model, batch).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            counts.append(optimizer.last_samples)
    optimizer.step()
    assert [*counts, optimizer.last_samples] == [8, 8, 4]
    assert optimizer.skipped_samples == 0


def test_samples_that_are_named_go_before_those_that_were_counted():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    x, y = batches(1)[0]
    for batch in DataLoader(TensorDataset(x, y), 4, shuffle=True):
        loss_on(model, batch).backward()
        optimizer.step(samples=3)
        optimizer.zero_grad()
    assert (optimizer.answered_samples, optimizer.skipped_samples) == (3, 0)


def test_without_a_loader_of_ours_a_step_is_one_sample():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    train(optimizer, model, batches(3))
    assert optimizer.answered_samples == 3


def test_the_state_dict_comes_and_goes_as_lightning_and_accelerate_do_it():
    both = Both()
    both.each(lambda model, optimizer: train(optimizer, model, batches(2)))
    state = copy.deepcopy(both.ours.state_dict())
    both.ours.load_state_dict(state)
    both.each(lambda model, optimizer: train(optimizer, model, batches(2)))
    both.same()


def test_a_state_dict_of_another_rate_is_refused_by_the_next_step():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.3
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"changed from 0\.1 to 0\.3"):
        train(optimizer, model, batches(1))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_cannot_be_copied(copied):
    with pytest.raises(TypeError, match=r"one worker's line to the shards\. Save the model's"):
        copied(Downpour(linear().parameters(), lr=LR))


def test_its_model_can_be_copied():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    twin = copy.deepcopy(model)
    train(optimizer, model, batches(2))
    assert flat(twin).equal(flat(linear()))
    assert pickle.loads(pickle.dumps(model)).weight.equal(model.weight)


def test_a_group_cannot_be_added():
    model, more = linear(), linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match="the layout of the shards was fixed"):
        optimizer.add_param_group({"params": more.parameters()})


def test_a_second_one_in_the_same_process_is_refused():
    Downpour(linear().parameters(), lr=LR)
    with pytest.raises(ValueError, match="has a Downpour already: give all parameters to one"):
        Downpour(linear().parameters(), lr=LR)


@pytest.mark.parametrize("name", ["betas", "dampening", "foreach", "fused", "maximize", "nesterov"])
def test_an_option_of_torchs_that_it_does_not_have_is_named(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        Downpour(linear().parameters(), lr=LR, **{name: True})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "lion"}, "'lion' is none of sgd, momentum"),
        ({"beta1": 0.9}, "sgd has no 'beta1'"),
        ({"rule": "adam", "momentum": 0.9}, "adam has no 'momentum'"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0"),
        ({"clip_part_norm": -1.0}, "clip_part_norm must be at least 0"),
        ({"fetch_policy": "later"}, "'later' is none of fresh, latest"),
        ({"overlap": True, "n_push": 2}, "overlap needs n_fetch = n_push = 1"),
        ({"overlap": True, "clip_norm": 1.0}, "overlap needs .* no clip_norm"),
        ({"schedule": Schedule(kind="poly")}, "a poly schedule needs its total, in samples"),
    ],
)
def test_an_option_that_cannot_be_is_refused_and_another_try_may_follow(options, text):
    with pytest.raises(ValueError, match=text):
        Downpour(linear().parameters(), **options)
    Downpour(linear().parameters(), lr=LR)


# Parameters


def test_weights_that_are_loaded_before_the_first_step_are_refused():
    model = linear()
    optimizer = Downpour(model.parameters(), lr=LR)
    model.load_state_dict(nn.Linear(20, 10).state_dict())
    with pytest.raises(ValueError, match="load weights first, then make Downpour"):
        train(optimizer, model, batches(1))
    assert optimizer.num_answered == 0


def test_a_parameter_that_was_replaced_is_refused_by_name():
    model = linear()
    optimizer = Downpour(model.named_parameters(), lr=LR)
    train(optimizer, model, batches(1))
    model.weight.data = model.weight.data.clone()
    with pytest.raises(ValueError, match=r"weight \[10, 20\] no longer lies in Downpour's vector"):
        train(optimizer, model, batches(1))


def test_a_model_that_was_moved_is_refused():
    model = linear()
    optimizer = Downpour(model.named_parameters(), lr=LR)
    model.double()
    with pytest.raises(ValueError, match="Move the model to its device and type first"):
        optimizer.step()


def test_buffers_are_merged_with_a_module():
    """One worker merges with nobody: what it gets back is its own."""
    plain = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10))
    model = copy.deepcopy(plain)
    optimizer = Downpour(model.parameters(), lr=LR, module=model)
    train(optimizer, model, batches(45))
    train(torch.optim.SGD(plain.parameters(), lr=LR), plain, batches(45))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def test_buffers_of_two_workers_are_weighed_by_their_samples():
    with Script(2) as script:
        models, optimizers = [], []
        for index in range(2):
            script.be(index)
            model = nn.BatchNorm1d(3)
            models.append(model)
            optimizers.append(Downpour(model.parameters(), lr=0.0, module=model))
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).sum().backward()
            optimizer.step(samples=1 + 2 * index)
            assert model.running_mean is not None
            model.running_mean.fill_(float(index))
            optimizer.merge_buffers()
        means = [dict(model.named_buffers())["running_mean"].tolist() for model in models]
        assert means == [[0.0] * 3, [0.75] * 3]
