"""Groups: whatever torch.optim takes, with names; and what cannot be meant is told."""

from typing import Any

import pytest
import torch
from torch import nn

from distbelief.param_server.layout import Group
from distbelief.workers.groups import name_groups


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


def names(made) -> list[str]:
    return [name for name, _ in made.named]


def test_plain_parameters_are_numbered():
    model = net()
    made = name_groups(model.parameters(), 0.1, 0.01)
    assert names(made) == ["param0", "param1", "param2", "param3"]
    assert [p for _, p in made.named] == list(model.parameters())
    assert made.groups == (Group(lr=0.1, weight_decay=0.01),)


def test_pairs_bring_their_names():
    assert names(name_groups(net().named_parameters(), 0.1, 0)) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


def test_a_module_gives_the_names():
    model = net()
    made = name_groups(list(model.parameters())[:2], 0.1, 0, model)
    assert names(made) == ["0.weight", "0.bias"]


def test_names_of_a_compiled_module_are_those_of_the_module():
    compiled = torch.compile(net(), backend="eager")
    assert isinstance(compiled, nn.Module)
    assert names(name_groups(compiled.named_parameters(), 0.1, 0)) == names(
        name_groups(net().named_parameters(), 0.1, 0)
    )


def test_groups_have_rates_and_decays_of_their_own_or_those_for_all():
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [("head", model[2].weight)], "weight_decay": 0.2},
        {"params": model[2].bias},
    ]
    made = name_groups(groups, 0.1, 0.01)
    assert made.groups == (
        Group(lr=0.5, weight_decay=0.01),
        Group(lr=0.1, weight_decay=0.2),
        Group(lr=0.1, weight_decay=0.01),
    )
    assert [(name, made.group_of[name]) for name in names(made)] == [
        ("param0", 0),
        ("param1", 0),
        ("head", 1),
        ("param3", 2),
    ]


def test_a_rate_may_be_a_tensor():
    assert name_groups(net().parameters(), torch.tensor(0.5), 0).groups == (Group(lr=0.5),)  # type: ignore[arg-type]


def test_frozen_parameters_are_set_aside_and_keep_the_names_of_the_others():
    model = net()
    model[0].requires_grad_(False)
    made = name_groups(model.parameters(), 0.1, 0)
    assert names(made) == ["param2", "param3"]
    assert [name for name, _ in made.frozen] == ["param0", "param1"]


WEIGHT = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ([], ValueError, "an empty list of parameters: was the generator used up"),
        (WEIGHT, TypeError, "a list of parameters, got one tensor: put it into a list"),
        ({WEIGHT}, TypeError, "the order of a set of parameters differs from worker to worker"),
        ([{"params": {WEIGHT}}], TypeError, "the order of a set"),
        ([torch.zeros(2)], TypeError, r"trains torch.nn.Parameter, got a Tensor as parameter 0"),
        ([WEIGHT, "bias"], TypeError, "got a str as parameter 1"),
        ([WEIGHT, WEIGHT], ValueError, "parameter param1 was given before, as param0"),
        (
            [("a", WEIGHT), ("a", nn.Parameter(torch.zeros(1)))],
            ValueError,
            "two parameters are named a",
        ),
        ([{"lr": 0.1}], TypeError, "parameter group 0 is no dict with params"),
        ([{"params": [WEIGHT]}, WEIGHT], TypeError, "parameter group 1 is no dict with params"),
        ([{"params": [WEIGHT], "momentum": 0.5}], ValueError, "group 0 has its own momentum"),
        ([{"params": [WEIGHT], "lr": -1.0}], ValueError, "lr must be .* at least 0, got -1.0"),
        ([nn.Parameter(torch.zeros(1, dtype=torch.cfloat))], ValueError, "param0 .* is complex"),
        (
            [("tied", WEIGHT), ("twin", nn.Parameter(WEIGHT.data))],
            ValueError,
            "tied and twin share their memory",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(params, error, text):
    with pytest.raises(error, match=text):
        name_groups(params, 0.1, 0)
