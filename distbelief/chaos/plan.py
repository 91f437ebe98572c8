"""Plan: what is to go wrong in a run, and how often. No process, no clock."""

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from distbelief.chaos.proxy import DIRECTIONS
from distbelief.problem import Problem

KINDS = ("kill", "pause", "cut", "drop", "lose", "disk")
NETWORK = ("cut", "drop", "lose")
"""Those for which a proxy stands before each shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultKind:
    """Something that goes wrong again and again."""

    kind: str
    """`kill` (SIGKILL), `pause` (SIGSTOP, and SIGCONT after `for_s`), `cut` (nothing passes between
    a shard and its workers for `for_s`), `drop` (answers are held back for `for_s`, then all
    connections of a shard end), `lose` (each worker's next connection to a shard loses a message),
    `disk` (no file of a shard's may grow for `for_s`)."""
    target: str = "shard"
    """`shard` or `worker`: one of them by chance; or a name, as `shard0` or `controller`."""
    every_s: float = 1.0
    """Seconds from one to the next; each by chance between half and one and a half of it."""
    for_s: float = 0.5
    """How long it lasts; two numbers in a plan file are the range it is drawn from."""
    for_max_s: float | None = None
    spaced: bool = False
    """Of `kill`: a shard only while no worker that is gone has pushes that no snapshot holds, a
    worker only while no shard waits for what it has to send again."""
    direction: str = "both"
    """Of `cut`: `both`, `to-shard` or `from-shard`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction {self.direction!r} is none of {', '.join(DIRECTIONS)}")
        if not self.every_s > 0 or self.for_s < 0:
            raise ValueError("every_s must be above 0, and for_s not below")
        if self.kind in (*NETWORK, "disk") and not self.target.startswith("shard"):
            raise ValueError(f"a {self.kind} is of a shard, not of {self.target!r}")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is to go wrong."""

    at_s: float
    """Seconds after the run has begun to train."""
    kind: FaultKind
    chance: float
    """In [0, 1): which of the targets it hits."""
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is to go wrong."""

    seconds: float = 60.0
    """How long the run goes on, the last 6 of them without faults."""
    seed: int = 0
    faults: tuple[FaultKind, ...] = field(default=())

    QUIET_S = 6.0

    @property
    def needs_proxies(self) -> bool:
        return any(kind.kind in NETWORK for kind in self.faults)

    def schedule(self) -> Iterator[Fault]:
        """The faults in their order; the same for the same seed."""
        found: list[Fault] = []
        for number, kind in enumerate(self.faults):
            rng = random.Random(f"{self.seed}/{number}")
            at = kind.every_s * rng.uniform(0.5, 1.5)
            while at < self.seconds - self.QUIET_S:
                longest = kind.for_s if kind.for_max_s is None else kind.for_max_s
                found.append(Fault(at, kind, rng.random(), rng.uniform(kind.for_s, longest)))
                at += kind.every_s * rng.uniform(0.5, 1.5)
        return iter(sorted(found, key=lambda fault: fault.at_s))

    @classmethod
    def from_toml(cls, path: Path) -> "Plan":
        """Raises: Problem."""
        try:
            data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))  # Any: TOML
            kinds = tuple(_kind(fault) for fault in data.pop("fault", []))
            return cls(**data, faults=kinds)
        except OSError as error:
            raise Problem("DB-USE-004", f"there is no plan {path}: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise Problem(
                "DB-USE-002",
                f"{path} is no plan of faults: {error}",
                fix="docs/reliability.md shows one",
            ) from error


def _kind(data: dict[str, Any]) -> FaultKind:  # Any: TOML
    for_s = data.get("for_s")
    if isinstance(for_s, list):
        data = {**data, "for_s": for_s[0], "for_max_s": for_s[1]}
    known = {f.name for f in fields(FaultKind)}
    if unknown := data.keys() - known:
        raise ValueError(f"a fault has no {sorted(unknown)[0]}")
    return FaultKind(**data)


def default_plan(
    *, spaced: bool, seconds: float = 60.0, seed: int = 0, pace_s: float = 1.0
) -> Plan:
    """kill -9 of a shard each `pace_s` and of a worker every three times as long."""
    return Plan(
        seconds=seconds,
        seed=seed,
        faults=(
            FaultKind(kind="kill", target="shard", every_s=pace_s, spaced=spaced),
            FaultKind(kind="kill", target="worker", every_s=3 * pace_s, spaced=spaced),
        ),
    )
