"""Spec: all that a process of a job has to be told, by whichever engine starts it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """All that a process has to be told."""

    role: str
    """worker or shard."""
    index: int
    inc: int
    """Incarnation of a worker, epoch of a shard."""
    run: str
    token: str = field(repr=False)
    controller: str
    """Endpoint of the controller."""
    job: str
    """The job as JSON."""
    run_path: str
    """The run's folder."""
    cwd: str
    """Where the launcher was called: the user's modules are found from here."""
    contract: str = ""
    """For a shard of a run that is resumed with another rate or length: what it goes on with."""

    @property
    def out(self) -> Path:
        """What the process writes to its standard output and error."""
        return Path(self.run_path) / "logs" / f"{self.name}.out"

    @property
    def name(self) -> str:
        return f"shard{self.index}" if self.role == "shard" else f"w{self.index}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        return cls(**json.loads(text))
