"""Groups: what a user hands to an optimizer, as names, parameters and groups of a layout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from distbelief.param_server.layout import Group, trainable

GROUP_KEYS = ("params", "param_names", "lr", "weight_decay")
"""What a group may say of its own. Everything else belongs to the one update rule."""

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
"""What torch.optim takes: tensors, (name, tensor) pairs, or dicts of one group each.
Any: the values of such a dict are of many types."""


@dataclass(frozen=True, slots=True)
class Named:
    """Parameters in the order of the layout, each with its name and group."""

    named: list[tuple[str, Parameter]]
    """As `layout.trainable` returns."""
    frozen: list[tuple[str, Parameter]]
    """Those that need no gradient: they are not in the layout."""
    groups: tuple[Group, ...]
    group_of: Mapping[str, int]
    """Name -> index in `groups`."""


def name_groups(
    params: Params, lr: float, weight_decay: float, module: nn.Module | None = None
) -> Named:
    """Read what was handed to an optimizer.

    module: gives the tensors their names where `params` does not.
    Raises: ValueError for nothing to train, a key that no group of ours has, a tensor that is
        given twice or cannot be trained; TypeError for what is no parameter.
    """
    _refuse_set(params)
    if isinstance(params, Tensor):
        raise TypeError("Downpour takes a list of parameters, got one tensor: put it into a list")
    given = list(params)
    if not given:
        raise ValueError("Downpour got an empty list of parameters: was the generator used up?")
    dicts: list[Mapping[str, Any]]  # Any: as in Params
    dicts = given if isinstance(given[0], Mapping) else [{"params": given}]  # type: ignore[assignment]  # told by its first item
    known = _names_of(module)
    named: list[tuple[str, Parameter]] = []
    group_of: dict[str, int] = {}
    groups: list[Group] = []
    seen: dict[int, str] = {}
    for index, group in enumerate(dicts):
        if not (isinstance(group, Mapping) and "params" in group):
            raise TypeError(
                f"parameter group {index} is no dict with params: give Downpour parameters, or "
                "dicts of one group each, not both"
            )
        for key in group:
            if key not in GROUP_KEYS:
                raise ValueError(
                    f"parameter group {index} has its own {key}: groups may differ in lr and "
                    "weight_decay, the update rule is one for all"
                )
        groups.append(
            Group(lr=group.get("lr", lr), weight_decay=group.get("weight_decay", weight_decay))
        )
        members = group["params"]
        _refuse_set(members)
        for item in [members] if isinstance(members, Tensor) else list(members):
            name, tensor = item if isinstance(item, tuple) else (None, item)
            if not isinstance(tensor, Parameter):
                raise TypeError(
                    f"Downpour trains torch.nn.Parameter, got a {type(tensor).__name__} as "
                    f"parameter {len(named)}"
                )
            name = name or known.get(id(tensor)) or f"param{len(named)}"
            name = name.replace("_orig_mod.", "")  # torch.compile's: a replica may do without it
            if id(tensor) in seen:
                raise ValueError(f"parameter {name} was given before, as {seen[id(tensor)]}")
            if name in group_of:
                raise ValueError(f"two parameters are named {name}")
            seen[id(tensor)] = name
            group_of[name] = index
            named.append((name, tensor))
    frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
    return Named(trainable(named), frozen, tuple(groups), group_of)


def _refuse_set(params: object) -> None:
    if isinstance(params, set | frozenset):
        raise TypeError(
            "the order of a set of parameters differs from worker to worker: give Downpour a list"
        )


def _names_of(module: nn.Module | None) -> dict[int, str]:
    if module is None:
        return {}
    return {id(parameter): name for name, parameter in module.named_parameters()}
