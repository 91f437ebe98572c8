"""One table of update rules, and what each of them must do as torch.optim does it."""

from typing import Any

import pytest
import torch

from distbelief.param_server.layout import Group
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.update import (
    RULES,
    SGD,
    Adagrad,
    Adam,
    Rule,
    make_rule,
    rule_as_dict,
    rule_from_dict,
)
from tests.param_server.jobs import TWO_GROUPS, make_contract, make_layout, numbers

STEPS, NUMEL, LR = 20, 1000, 0.05

# name -> (rule, weight decay, torch's optimizer, its hyper-parameters)
TABLE: dict[str, tuple[Rule, float, Any, dict[str, Any]]] = {
    "sgd": (SGD(), 0.0, torch.optim.SGD, {}),
    "sgd-decay": (SGD(), 0.1, torch.optim.SGD, {}),
    "momentum": (SGD(momentum=0.9), 0.01, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        SGD(momentum=0.9, nesterov=True),
        0.01,
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "adagrad": (Adagrad(), 0.01, torch.optim.Adagrad, {}),
    "adam": (Adam(), 0.01, torch.optim.Adam, {}),
    "adamw": (Adam(decoupled=True), 0.01, torch.optim.AdamW, {}),
}
every_rule = pytest.mark.parametrize("name", TABLE)


def state(rule, numel=NUMEL):
    return {slot: torch.zeros(numel) for slot in rule.slots}


def step_of(rule, values, grad, state, **how):
    """One step of a rule on whole tensors."""
    rule.apply_([values], [grad], {slot: [tensor] for slot, tensor in state.items()}, **how)


def grads(steps=STEPS, numel=NUMEL):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(numel, generator=draw) for _ in range(steps)]


def ours(name, start, steps, decay=None):
    rule, weight_decay = TABLE[name][:2]
    values, slots = start.clone(), state(rule, len(start))
    for step, grad in enumerate(steps):
        step_of(rule, values, grad, slots, lr=LR, weight_decay=weight_decay, step=step)
    return values, slots


def theirs(name, start, steps, **how):
    _, weight_decay, optimizer, hyper = TABLE[name]
    parameter = torch.nn.Parameter(start.clone())
    optim = optimizer([parameter], lr=LR, weight_decay=weight_decay, **hyper, **how)
    for grad in steps:
        parameter.grad = grad.clone()
        optim.step()
    return parameter.detach()


@every_rule
def test_a_rule_equals_torchs_fused_optimizer_bit_for_bit(name):
    start = numbers(make_layout(("w", (NUMEL,), 0)))
    assert torch.equal(ours(name, start, grads())[0], theirs(name, start, grads(), fused=True))


@every_rule
def test_a_rule_equals_torchs_default_optimizer_up_to_float32_rounding(name):
    """20 steps, 1e-6 of the largest value: a few units in the last place, 1.2e-7, per step."""
    start = numbers(make_layout(("w", (NUMEL,), 0)))
    expected = theirs(name, start, grads(), foreach=False)
    difference = (ours(name, start, grads())[0] - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max()


@every_rule
def test_a_rule_only_reads_the_gradient(name):
    (grad,) = grads(1)
    before = grad.clone()
    ours(name, torch.ones(NUMEL), [grad])
    assert torch.equal(grad, before)


@every_rule
def test_a_rule_goes_on_from_copied_state_as_if_nothing_had_happened(name):
    rule, decay = TABLE[name][:2]
    steps = grads()
    straight, _ = ours(name, torch.ones(NUMEL), steps)
    values, slots = ours(name, torch.ones(NUMEL), steps[:7])
    values, slots = values.clone(), {slot: tensor.clone() for slot, tensor in slots.items()}
    for step, grad in enumerate(steps[7:], start=7):
        step_of(rule, values, grad, slots, lr=LR, weight_decay=decay, step=step)
    assert torch.equal(values, straight)


@every_rule
def test_a_rule_finds_the_minimum_of_a_quadratic(name):
    rule = TABLE[name][0]
    target = torch.linspace(-1, 1, 64)
    values, slots = torch.zeros(64), state(rule, 64)
    for step in range(400):
        step_of(rule, values, values - target, slots, lr=0.2, weight_decay=0.0, step=step)
    assert (values - target).abs().max() < 0.02


@every_rule
def test_cutting_a_vector_into_parts_changes_no_bit(name):
    rule, decay = TABLE[name][:2]
    start = numbers(make_layout(("w", (NUMEL,), 0)))
    whole, whole_state = ours(name, start, grads())
    cut, cut_state = start.clone(), state(rule)
    for step, grad in enumerate(grads()):
        for low in range(0, NUMEL, 64):  # parts begin at multiples of 64
            part = slice(low, low + 64)
            step_of(
                rule,
                cut[part],
                grad[part],
                {slot: tensor[part] for slot, tensor in cut_state.items()},
                lr=LR,
                weight_decay=decay,
                step=step,
            )
    assert torch.equal(cut, whole)
    assert all(torch.equal(cut_state[slot], whole_state[slot]) for slot in rule.slots)


@every_rule
def test_two_groups_in_one_vector_equal_torchs_two_groups(name):
    """1e-6 relative: a run that begins inside a vector register is rounded by other code."""
    rule, _, optimizer, hyper = TABLE[name]
    contract = make_contract(TWO_GROUPS, rule)
    start = numbers(TWO_GROUPS)
    parts = [Part(part, contract) for part in TWO_GROUPS.parts]
    for part in parts:
        part.load_({VALUES: start[part.range.start : part.range.stop]})
    parameters = [torch.nn.Parameter(start[e.offset : e.stop].clone()) for e in TWO_GROUPS.entries]
    w, b, v = parameters
    optim = optimizer(
        [
            {"params": [w, v], "lr": 0.1, "weight_decay": 0.01},
            {"params": [b], "lr": 0.2, "weight_decay": 0.0},
        ],
        lr=1.0,
        fused=True,
        **hyper,
    )
    for grad in grads(STEPS, TWO_GROUPS.total):
        for part in parts:
            part.apply_(grad[part.range.start : part.range.stop], samples=1)
        for entry, parameter in zip(TWO_GROUPS.entries, parameters, strict=True):
            parameter.grad = grad[entry.offset : entry.stop].clone()
        optim.step()
    values = torch.cat([part.values for part in parts])
    expected = torch.cat([parameter.detach() for parameter in parameters])
    assert (values - expected).abs().max() <= 1e-6 * expected.abs().max()


@every_rule
def test_a_rule_survives_json(name):
    rule = TABLE[name][0]
    assert rule_from_dict(rule_as_dict(rule)) == rule


@pytest.mark.parametrize("name", RULES)
def test_each_named_rule_is_made_with_its_defaults(name):
    expected = {
        "sgd": SGD(),
        "momentum": SGD(momentum=0.9),
        "nesterov": SGD(momentum=0.9, nesterov=True),
        "adagrad": Adagrad(eps=1e-10),
        "adam": Adam(),
        "adamw": Adam(decoupled=True),
    }
    assert make_rule(name) == expected[name]


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("rmsprop", {}, "rmsprop.* is none of sgd, momentum"),
        ("sgd", {"momentum": 0.9}, r"no 'momentum' \(it takes: none\)"),
        ("adam", {"eps_": 1.0}, r"takes: beta1, beta2, eps"),
        ("momentum", {"momentum": 1.0}, r"in \[0, 1\)"),
        ("momentum", {"momentum": -0.1}, r"in \[0, 1\)"),
        ("momentum", {"momentum": float("nan")}, r"in \[0, 1\)"),
        ("nesterov", {"momentum": 0.0}, "momentum above 0"),
        ("adam", {"beta1": 1.0}, "betas"),
        ("adamw", {"beta2": -0.5}, "betas"),
        ("adam", {"eps": 0.0}, "eps"),
        ("adagrad", {"eps": -1.0}, "eps"),
        ("adagrad", {"eps": float("nan")}, "eps"),
    ],
)
def test_a_wrong_hyper_parameter_is_refused_by_name(name, hyper, words):
    with pytest.raises(ValueError, match=words):
        make_rule(name, **hyper)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "Odd"},
        {"kind": ["SGD"]},
        {"kind": "SGD", "momentum": "0.9"},
        {"kind": "SGD", "momentum": True},
        {"kind": "SGD", "momentum": 0.9, "nesterov": "yes"},
        {"kind": "Adagrad", "eps": "x"},
        {"kind": "Adam", "decoupled": 1.5},
        {"kind": "Adam", "odd": 1.0},
    ],
    ids=str,
)
def test_json_that_is_no_rule_is_refused(data):
    with pytest.raises((ValueError, TypeError, KeyError)):
        rule_from_dict(data)


def test_weight_decay_of_a_group_reaches_its_tensors_only():
    contract = make_contract(
        make_layout(
            ("a", (32,), 0), ("b", (32,), 1), groups=[Group(lr=1, weight_decay=0.5), Group(lr=1)]
        )
    )
    part = Part(contract.layout.parts[0], contract)
    part.load_({VALUES: torch.ones(64)})
    part.apply_(torch.zeros(64), samples=1)
    assert part.values.tolist() == [0.5] * 32 + [1.0] * 32
