"""Logger: what every logger of a run can do, and what one is told when it does not work."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

from distbelief.chronicle import Begin, Event


class Logger(Protocol):
    """Writes what it is told somewhere. Called by one thread, which may wait as long as it likes.

    Each method may raise whatever it does: it is called again, or the record is given up.
    """

    name: str

    def start(self, begin: Begin) -> None:
        """The run, before all else. Raises: Missing if its package is not installed."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Single numbers by tag. step: updates applied so far; it never falls."""
        ...

    def histogram(
        self, name: str, edges: Sequence[float], counts: Sequence[int], step: int
    ) -> None:
        """counts: one between each edge and the next, of the last minute."""
        ...

    def event(self, event: Event, step: int) -> None: ...

    def finish(self, status: str) -> None:
        """status: result.json's word for how it ended; `done` if all is well."""
        ...


class Missing(Exception):
    """A logger's package is not installed. There is no sense in another try."""


def package(name: str, logger: str) -> ModuleType:
    """Import it now: a run without this logger never does. Raises: Missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise  # it is there, and lacks something of its own
        raise Missing(
            f"logger {logger} is off: the package {name.partition('.')[0]} is not installed; "
            f"pip install 'distbelief[{logger}]'"
        ) from error


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:  # Any: JSON
    """train.lr and so on: a row each, where a logger has no place for tables in tables."""
    rows: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value
    return rows


Maker = Callable[[], Logger]
