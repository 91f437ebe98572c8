"""System: a way to do the work: which processes it takes and what may be asked of its results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRANSPORTS = ("shm", "tcp")


@dataclass(frozen=True, kw_only=True)
class System:
    """Roles are `module:function`, called with a Station in a process of their own."""

    name: str
    transport: str
    """What its bytes go over: shm, tcp, or what the system itself chooses."""
    worker: str
    """Role of a worker."""
    server: str = ""
    """Role of a server; empty where there is none."""
    args: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON
    """What both are told besides."""
    has_folder: bool = False
    """Its processes are given a folder, which goes with them."""
    is_one_process: bool = False
    """The worker's role plays all workers, in one process and their seats."""
    is_synchronous: bool = False
    """All workers do each round together, and the parameters see one push of it."""
    never_rests: bool = False
    """Its processes take the cores even while they wait: they are stopped while others run."""
    is_whole: bool = False
    """Parts are never torn."""
    tolerance: float | None = 0.0
    """How far values may be from what the work says, as a share, besides half a push: for forms
    that lose something on the way. None: not a bit."""

    @property
    def label(self) -> str:
        """Name and transport, where the name does not say it already."""
        return f"{self.name} {self.transport}" if self.name == "distbelief" else self.name
