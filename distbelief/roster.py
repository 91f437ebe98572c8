"""Roster: the members of an ensemble, and which of them are trained.

    DIR/ensemble.json     who they are
    DIR/member-1/RUN      the runs of the first, and so on

The paper's seven had the same first weights and learning rates, and saw the data in other orders;
one of them was wider. How much wider it does not say. Source: Szegedy et al. 2014 section 7.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distbelief.folder import RunFolder
from distbelief.problem import Problem

FILE = "ensemble.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One model of an ensemble."""

    number: int
    """From 1."""
    data_seed: int
    """Of the order in which it sees the data, and of the views that it sees."""
    width: float
    """Multiplier on its channels; 0 leaves what the job says."""

    @property
    def settings(self) -> list[str]:
        """What it is launched with besides what all are."""
        wider = [f"model.width={self.width!r}"] if self.width else []
        return [f"data.seed={self.data_seed}", *wider]


@dataclass(frozen=True, slots=True)
class Roster:
    """See the top of this file."""

    path: Path
    members: tuple[Member, ...]
    arguments: tuple[str, ...]
    """What all are launched with."""

    @classmethod
    def of(
        cls, path: Path, number: int, width: float, wider: float, arguments: Sequence[str]
    ) -> "Roster":
        """The members: the last one `wider` times as wide as the others, who have `width`."""
        members = [
            Member(
                number=i,
                data_seed=i,
                width=width * wider if i == number and number > 1 and wider != 1 else 0.0,
            )
            for i in range(1, number + 1)
        ]
        return cls(path, tuple(members), tuple(arguments))

    def write(self) -> None:
        """Raises: Problem if it cannot be written."""
        told = {
            "v": 1,
            "arguments": list(self.arguments),
            "members": [dataclasses.asdict(member) for member in self.members],
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            part = self.path / f".{FILE}"
            part.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            part.replace(self.path / FILE)
        except OSError as error:
            raise Problem(
                "DB-STORE-002",
                f"{self.path} cannot be written: {error.strerror or error}",
                fix="name another place with --out",
            ) from error

    def place(self, member: Member) -> Path:
        """Where a member's runs are."""
        return self.path / f"member-{member.number}"

    def newest(self, member: Member) -> RunFolder | None:
        """A member's newest run, if there is one."""
        place = self.place(member)
        runs = sorted(path for path in place.glob("*") if (path / "config.toml").is_file())
        return RunFolder(runs[-1]) if runs else None

    def is_done(self, member: Member) -> bool:
        run = self.newest(member)
        return run is not None and (run.result or {}).get("exit") == "done" and run.model.is_file()

    @property
    def done(self) -> list[Path]:
        """The run folders of the members that are trained. Raises: Problem if none is."""
        found = [run.path for m in self.members if (run := self.newest(m)) and self.is_done(m)]
        if not found:
            raise Problem(
                "DB-RUN-006",
                f"no member of {self.path} is trained yet",
                fix="distbelief train-ensemble goes on with it",
            )
        return found


def read_roster(path: Path) -> Roster | None:
    """None where there is none. Raises: Problem for one that cannot be read."""
    file = path / FILE
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        members = tuple(Member(**member) for member in told["members"])
        return Roster(path, members, tuple(told["arguments"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            "DB-RUN-002", f"{file} cannot be read: {error}", fix="name another folder with --out"
        ) from error
