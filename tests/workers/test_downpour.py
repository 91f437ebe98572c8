"""Downpour: when gradients leave and parameters come, held against the paper's pseudo-code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.param_server.layout import Group
from distbelief.param_server.protocol import Push
from distbelief.param_server.update import make_rule
from distbelief.workers import downpour as module
from distbelief.workers.downpour import DownpourConfig, clip_
from tests.workers.jobs import Servers, batches, contract_of, flat
from tests.workers.late import Late


@pytest.fixture(autouse=True, params=["in place", "late"])
def _staging(request, monkeypatch) -> None:
    """Everything here holds on the CPU and on a device."""
    if request.param == "late":
        monkeypatch.setattr(module, "staging_of", lambda _: Late())


def linear() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(20, 10)  # 210 parameters in 4 parts


def loss_on(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def train(downpour, model, batch, samples: int = 4) -> None:
    downpour.zero_grad()
    loss_on(model, batch).backward()
    downpour.step(samples=samples)


def gradient(values: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the linear model at flat parameters."""
    leaf = values.clone().requires_grad_()
    outputs = F.linear(batch[0], leaf[:200].view(10, 20), leaf[200:])
    (grad,) = torch.autograd.grad(F.mse_loss(outputs, batch[1]), leaf)
    return grad


def paper(batches, n_fetch: int, n_push: int, alpha: float, lr: float):
    """The client's pseudo-code of Dean et al. 2012 with one client, and SGD on the server.

    Returns parameters before each step, and what was pushed at which step.
    """
    server = flat(linear())
    parameters, accrued = server.clone(), torch.zeros_like(server)
    seen, pushed = [], []
    for step, batch in enumerate(batches):
        if step % n_fetch == 0:
            parameters = server.clone()
        seen.append(parameters.clone())
        g = gradient(parameters, batch)
        accrued += g
        parameters -= alpha * g
        if step % n_push == 0:
            server -= lr * accrued
            pushed.append((step, accrued.clone()))
            accrued.zero_()
    return seen, pushed


@pytest.mark.parametrize("num_shards", [1, 3])
def test_with_one_worker_fresh_equals_plain_torch(num_shards):
    model, plain = linear(), linear()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    servers = Servers(contract_of(model, make_rule("momentum"), lr=0.1), num_shards)
    with servers.worker(model) as downpour:
        for batch in batches(12):
            train(downpour, model, batch)
            optimizer.zero_grad()
            loss_on(plain, batch).backward()
            optimizer.step()
            torch.testing.assert_close(flat(model), flat(plain), rtol=1e-6, atol=1e-8)
        assert downpour.last_pushed is not None
        assert downpour.last_pushed.staleness == 0
        assert downpour.num_steps == downpour.num_answered == 12


@pytest.mark.parametrize("local_lr", [0.0, 0.05])
@pytest.mark.parametrize(("n_fetch", "n_push"), [(2, 3), (3, 2), (1, 3), (4, 1), (2, 2)])
def test_fresh_follows_the_pseudo_code_of_the_paper(n_fetch, n_push, local_lr):
    model, data = linear(), batches(11)
    seen, pushed = paper(data, n_fetch, n_push, local_lr, lr=0.1)
    servers = Servers(contract_of(model, lr=0.1))
    config = DownpourConfig(n_fetch=n_fetch, n_push=n_push, local_lr=local_lr)
    with servers.worker(model, config) as downpour:
        for step, batch in enumerate(data):
            torch.testing.assert_close(flat(model), seen[step], rtol=1e-5, atol=1e-7)
            train(downpour, model, batch)
            num_due = len([at for at, _ in pushed if at <= step])
            assert len(servers.pushes) == num_due
    for mine, (_, theirs) in zip(servers.grads, pushed, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_the_first_push_carries_one_gradient_and_later_ones_n_push():
    model = linear()
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(n_push=3, n_fetch=2)) as downpour:
        for batch in batches(7):
            train(downpour, model, batch, samples=4)
    assert [push.samples for push in servers.pushes] == [4, 12, 12]
    assert [push.seq for push in servers.pushes] == [1, 2, 3]


def test_samples_count_as_answered_once_their_push_was():
    model, answered = linear(), []
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(n_push=3)) as downpour:
        for samples, batch in zip((1, 2, 3, 4, 5), batches(5), strict=True):
            train(downpour, model, batch, samples)
            answered.append(downpour.answered_samples)
        downpour.flush()
        answered.append(downpour.answered_samples)
    assert answered == [1, 1, 1, 10, 10, 15]


def test_flush_pushes_what_has_accrued_and_takes_the_fresh_parameters():
    model = linear()
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(n_push=4, n_fetch=100, local_lr=0.3)) as downpour:
        for batch in batches(3):
            train(downpour, model, batch)
        assert not flat(model).equal(servers.values)
        downpour.flush()
        assert flat(model).equal(servers.values)
        downpour.flush()
    assert [push.samples for push in servers.pushes] == [4, 8]


def test_latest_never_waits_for_a_slow_server_and_loses_nothing():
    model, data = linear(), batches(6)
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(fetch_policy="latest")) as downpour:
        servers.gate.clear()
        first = flat(model)
        for batch in data:
            train(downpour, model, batch)  # a step that waited would hang here
        assert servers.pushes == []
        assert downpour.answered_samples == 0
        assert flat(model).equal(first)
        servers.gate.set()
        downpour.flush()
        assert downpour.answered_samples == servers.samples_pushed == 6 * 4
        assert flat(model).equal(servers.values)
    assert [push.samples for push in servers.pushes] == [4, 20]
    torch.testing.assert_close(
        sum(servers.grads), sum(gradient(first, batch) for batch in data), rtol=1e-5, atol=1e-7
    )


def test_latest_steps_locally_while_the_server_is_slow():
    model, data = linear(), batches(3)
    servers = Servers(contract_of(model))
    config = DownpourConfig(fetch_policy="latest", local_lr=0.05)
    with servers.worker(model, config) as downpour:
        servers.gate.clear()
        expected = flat(model)
        for batch in data:
            train(downpour, model, batch)
            expected = expected - 0.05 * gradient(expected, batch)
            torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-7)


def test_latest_says_on_which_version_its_gradient_was_computed():
    """Not on the one that came in while it was computed: staleness would look too small."""
    model, data = linear(), batches(2)
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(fetch_policy="latest")) as downpour:
        for batch in data:  # both on version 0: the answer to the first is taken in at the second
            train(downpour, model, batch)
        downpour.flush()
    assert [set(push.base) for push in servers.pushes] == [{0}, {0}]
    assert [set(push.bseq) for push in servers.pushes] == [{0}, {0}]


def test_latest_trains_as_many_samples_as_are_pushed_in_the_end():
    model = linear()
    servers = Servers(contract_of(model, lr=0.01))
    config = DownpourConfig(fetch_policy="latest", n_push=2, n_fetch=3, local_lr=0.01)
    with servers.worker(model, config) as downpour:
        for batch in batches(40):
            train(downpour, model, batch)
        downpour.flush()
        assert downpour.answered_samples == servers.samples_pushed == 40 * 4
        assert downpour.num_answered == len(servers.pushes)


def test_clip_norm_equals_clip_grad_norm():
    model, plain = linear(), linear()
    servers = Servers(contract_of(model, make_rule("momentum"), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with servers.worker(model, DownpourConfig(clip_norm=0.2)) as downpour:
        for batch in batches(5):
            train(downpour, model, batch)
            optimizer.zero_grad()
            loss_on(plain, batch).backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.2)
            assert norm > 0.2
            optimizer.step()
            torch.testing.assert_close(flat(model), flat(plain), rtol=1e-6, atol=1e-8)


def test_a_gradient_below_the_limit_is_not_scaled():
    grad = torch.tensor([0.3, 0.4])
    clip_(grad, 1.0)
    assert grad.tolist() == torch.tensor([0.3, 0.4]).tolist()


def test_a_learning_rate_changed_here_is_refused_and_the_schedule_named():
    model = linear()
    with Servers(contract_of(model, lr=0.1)).worker(model) as downpour:
        downpour.param_groups[0]["lr"] = 0.01
        with pytest.raises(ValueError, match=r"changed from 0.1 to 0.01 .* schedule"):
            train(downpour, model, batches(1)[0])


def test_a_scheduler_of_torch_is_refused_at_its_first_change():
    model = linear()
    servers = Servers(contract_of(model, lr=0.1))
    with servers.worker(model) as downpour:
        scheduler = torch.optim.lr_scheduler.StepLR(downpour, step_size=2, gamma=0.5)
        for batch in batches(2):
            train(downpour, model, batch)
            scheduler.step()
        with pytest.raises(ValueError, match=r"train\.schedule"):
            train(downpour, model, batches(1)[0])
    assert len(servers.pushes) == 2


def test_a_closure_is_called_once_and_its_loss_returned():
    model, batch, calls = linear(), batches(1)[0], []
    servers = Servers(contract_of(model))
    with servers.worker(model) as downpour:

        def closure() -> float:
            downpour.zero_grad()
            loss = loss_on(model, batch)
            loss.backward()
            calls.append(float(loss.detach()))
            return calls[-1]

        assert downpour.step(closure, samples=4) == calls[0]
    assert len(calls) == len(servers.pushes) == 1


def test_a_tensor_without_a_gradient_is_left_alone_even_by_weight_decay():
    model = nn.ModuleDict({"used": nn.Linear(20, 10), "unused": nn.Linear(3, 3)})
    servers = Servers(
        contract_of(model, make_rule("momentum"), groups=[Group(lr=0.1, weight_decay=0.5)])
    )
    before = flat(model["unused"]).clone()
    with servers.worker(model) as downpour:
        for batch in batches(3):
            downpour.zero_grad()
            loss_on(model["used"], batch).backward()
            downpour.step(samples=4)
        assert flat(model["unused"]).equal(before)


def test_a_tensor_is_absent_from_a_push_only_if_it_was_from_all_its_gradients():
    model = nn.ModuleDict({name: nn.Linear(4, 1, bias=False) for name in "abc"})
    servers = Servers(contract_of(model))
    x = torch.ones(1, 4)
    with servers.worker(model, DownpourConfig(n_push=2)) as downpour:
        for names in ("abc", "a", "b"):
            downpour.zero_grad()
            sum(model[name](x).sum() for name in names).backward()
            downpour.step()
    assert [push.absent for push in servers.pushes] == [(), (b"\x04",)]  # the third: c


def test_parts_that_refuse_a_push_show_in_last_pushed():
    model, batch = linear(), batches(1)[0]
    servers = Servers(contract_of(model))
    with servers.worker(model) as downpour:
        before = flat(model).clone()
        downpour.zero_grad()
        loss_on(model, batch).backward()
        assert model.bias.grad is not None
        model.bias.grad[0] = float("nan")
        downpour.step(samples=4)
        pushed = downpour.last_pushed
        assert pushed is not None
        assert pushed.is_partial
        assert pushed.statuses == {"applied": 3, "nonfinite": 1}
        assert len(pushed.reasons) == 1
        assert "bias[0] is nan" in pushed.reasons[0]
        assert downpour.answered_samples == 4
        assert flat(model)[192:].equal(before[192:])
        assert not flat(model)[:64].equal(before[:64])
        train(downpour, model, batch)
        again = downpour.last_pushed
        assert again is not None
        assert not again.is_partial


def test_two_groups_have_rates_and_decays_of_their_own():
    model, plain = linear(), linear()
    groups = [Group(lr=0.1, weight_decay=0.01), Group(lr=0.2)]
    contract = contract_of(model, make_rule("nesterov"), groups=groups, group_of={"bias": 1})
    optimizer = torch.optim.SGD(
        [
            {"params": [plain.weight], "lr": 0.1, "weight_decay": 0.01},
            {"params": [plain.bias], "lr": 0.2},
        ],
        momentum=0.9,
        nesterov=True,
    )
    with Servers(contract, 2).worker(model) as downpour:
        assert [group["lr"] for group in downpour.param_groups] == [0.1, 0.2]
        for batch in batches(6):
            train(downpour, model, batch)
            optimizer.zero_grad()
            loss_on(plain, batch).backward()
            optimizer.step()
            torch.testing.assert_close(flat(model), flat(plain), rtol=1e-6, atol=1e-8)


def test_half_precision_replicas_train_on_float32_masters():
    model = linear().to(torch.bfloat16)
    servers = Servers(contract_of(model, lr=1e-4))
    with servers.worker(model) as downpour:
        start = servers.values
        for x, y in batches(8):
            train(downpour, model, (x.bfloat16(), y.bfloat16()))
        # Steps this small vanish in bfloat16, but not on the shard.
        assert 0 < float((servers.values - start).abs().max()) < 1e-2
        assert flat(model).equal(servers.values.bfloat16())


def test_a_second_worker_starts_from_what_the_first_has_reached():
    first, second = linear(), nn.Linear(20, 10)
    servers = Servers(contract_of(first), num_workers=2)
    with servers.worker(first) as downpour:
        train(downpour, first, batches(1)[0])
        with servers.worker(second, w="w1") as other:
            assert flat(second).equal(flat(first))
            train(other, second, batches(1)[0])
            train(downpour, first, batches(1)[0])
            assert downpour.last_pushed is not None
            assert downpour.last_pushed.staleness == 1
            assert not flat(second).equal(flat(first))


def test_a_sparse_gradient_is_refused_before_anything_leaves():
    model = nn.Embedding(30, 4, sparse=True)
    servers = Servers(contract_of(model))
    with servers.worker(model) as downpour:
        downpour.zero_grad()
        with pytest.raises(ValueError, match=r"gradient of weight \[30, 4\] is sparse"):
            model(torch.tensor([1])).sum().backward()
    assert servers.pushes == []


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("n_fetch", 0, "n_fetch must be at least 1, got 0"),
        ("n_push", -1, "n_push must be at least 1, got -1"),
        ("fetch_policy", "soon", "fetch_policy 'soon' is none of fresh, latest"),
        ("local_lr", -0.1, "local_lr must be at least 0, got -0.1"),
        ("local_lr", float("nan"), "local_lr must be at least 0, got nan"),
        ("clip_norm", float("inf"), "clip_norm must be at least 0, got inf"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(field, value, text):
    with pytest.raises(ValueError, match=text):
        DownpourConfig(**{field: value})


def test_a_push_that_asks_for_no_parameters_gets_none():
    model = linear()
    servers = Servers(contract_of(model))
    with servers.worker(model, DownpourConfig(n_fetch=2)) as downpour:
        for batch in batches(4):
            train(downpour, model, batch)
    assert [isinstance(p, Push) and p.fetch for p in servers.pushes] == [False, True] * 2


def test_a_gradient_whose_norm_is_not_finite_becomes_nan_throughout():
    """So that no shard takes the parts of it that happen to be finite."""
    grad = torch.tensor([1.0, torch.inf, 2.0])
    clip_(grad, 5.0)
    assert grad.isnan().all()
