"""Key: one value that a job takes: its name, its default and what it means.

All of it is read from the configuration classes; the meaning is the text below each field. So
`config init`, `config explain` and the table in docs/configuration.md cannot say different things.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from distbelief.job import Job
from distbelief.settings import FLAGS, KeyProblem


@dataclass(frozen=True, slots=True)
class Key:
    """One value of a job."""

    name: str
    """With its sections, such as train.lr."""
    default: Any  # TOML; None where it depends on other keys
    meaning: str

    @property
    def flag(self) -> str:
        """Its flag of `launch`; empty if it has none."""
        flag = next((flag for flag, key in FLAGS.items() if key == self.name), "")
        return "--" + flag.replace("_", "-") if flag else ""


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, values before sections, as a file would have them."""
    return tuple(_keys(Job(), ""))


def find_keys(name: str) -> list[Key]:
    """The key of that name, or those of a section. `model.args.x` is model.args.

    Raises: Problem with the nearest name if there is none.
    """
    found = [k for k in all_keys() if k.name == name or k.name.startswith(name + ".")]
    found = found or [
        k for k in all_keys() if isinstance(k.default, dict) and name.startswith(k.name + ".")
    ]
    if not found:
        near = difflib.get_close_matches(name, [k.name for k in all_keys()], n=1)
        fix = f"did you mean {near[0]}?" if near else "distbelief config show has all of them"
        raise KeyProblem(name, f"unknown key {name}", fix)
    return found


def _keys(config: Any, prefix: str) -> Iterator[Key]:  # Any: one of our configuration classes
    meanings = _meanings(type(config))
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in values.items():
        if not dataclasses.is_dataclass(value):
            default = list(value) if isinstance(value, tuple) else value
            yield Key(prefix + name, default, meanings[name])
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{name}.")


def _meanings(config: type) -> dict[str, str]:
    """Field -> the text below it, on one line. Python drops these texts, so the source is read."""
    source = textwrap.dedent(inspect.getsource(config))
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found: dict[str, str] = {}
    for statement, below in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(below.value.value).split())
    return found
