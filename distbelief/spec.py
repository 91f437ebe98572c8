"""Spec: all that a process of a job has to be told, by whichever engine starts it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distbelief.param_server.curve import Keys
from distbelief.param_server.secret import Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """All that a process has to be told."""

    role: str
    """worker, shard or evaluator."""
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
    is_warm: bool = False
    """It may be forked from a process that has imported torch, where the engine has one."""
    port: int = 0
    """For a shard that is started again: where its workers look for it; 0 for any."""
    contract: str = ""
    """For a shard of a run that is resumed with another rate or length: what it goes on with."""
    host: str = ""
    """Address at which it listens; empty for the job's `net.host`."""
    beside: int = 0
    """Workers that share its host; 0: all of the job."""
    lease_s: float = 0.0
    """A shard that the controller has not answered for so long takes nothing until it does: it may
    have been replaced. 0 where no network can come between."""
    monitor: str = ""
    """Where it sends its reports; empty where there is no monitor."""
    keys: Keys | None = None
    """What it needs to speak with the others; None where nothing is encrypted."""

    @property
    def history(self) -> Path:
        """Where workers write down what they push, if the job says so."""
        return Path(self.run_path) / "history"

    @property
    def out(self) -> Path:
        """What the process writes to its standard output and error."""
        return Path(self.run_path) / "logs" / f"{self.name}.out"

    @property
    def name(self) -> str:
        if self.role == "evaluator":
            return self.role
        return f"shard{self.index}" if self.role == "shard" else f"w{self.index}"

    def to_json(self) -> str:
        """With its secrets: for a pipe to the process and nothing else."""
        keys = None if self.keys is None else self.keys.to_dict()
        return json.dumps({**asdict(self), "keys": keys})

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        data = json.loads(text)
        keys = data.pop("keys", None)
        secret = Secret(data.pop("token"))
        return cls(**data, token=secret, keys=None if keys is None else Keys.from_dict(keys))
