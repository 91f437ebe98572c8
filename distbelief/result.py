"""Result: the record that every run leaves, however it ends: RUN/result.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

EXITS = ("done", "stopped", "failed", "degraded", "storage")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good a model is on a split."""

    split: str
    top1: float | None
    """In [0, 1]; None where the data is no classification."""
    top5: float | None
    """As top1; None below 6 classes."""
    loss: float | None = None
    """Mean over the samples; None where the model has none in evaluation."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What a run came to. Rates and times in seconds; accuracies in [0, 1]."""

    run: str
    run_dir: str
    engine: str = ""
    workers: int = 0
    shards: int = 0
    samples: int = 0
    """Applied by the part furthest behind."""
    updates: int = 0
    """The smallest version of a part."""
    train_loss: float | None = None
    """Mean over the newest samples, at most an epoch of them."""
    eval: Accuracy | None = None
    """Of the run's model: the average of its values, if it has one."""
    eval_last: Accuracy | None = None
    """Of the last values, where the model is their average."""
    averaged: int = 0
    """Updates that are in the average, of the part with the fewest."""
    staleness: dict[str, int | float | None] = field(
        default_factory=lambda: {"p50": None, "p95": None, "max": None}
    )
    """Of pushes to parts, as the shards counted them."""
    samples_per_s: float = 0.0
    train_s: float = 0.0
    """From the first fetch to the last apply."""
    wall_s: float = 0.0
    worker_samples: dict[str, int] = field(default_factory=dict)
    """Worker -> samples whose pushes were answered. In a short run a worker may come too late."""
    workers_lost: int = 0
    """How often a worker vanished; each is started again."""
    drained: list[str] = field(default_factory=list)
    """Workers that left before the end because they were asked to: by `distbelief drain`, or by
    SIGTERM, as where a machine is about to go away."""
    accounting: dict[str, int | bool] = field(default_factory=dict)
    """What became of every sample that this attempt has handed out; see account.py. `adds_up`: so
    many were handed out, and the shards' own counts say the same."""
    shard_restarts: int = 0
    controller_restarts: int = 0
    lost_double_fault: int = 0
    """Parts of acknowledged pushes that are lost: their worker was, and then their shard, before
    a snapshot had them."""
    refused: int = 0
    """Parts of pushes that the shards refused."""
    skipped_samples: int = 0
    """Samples whose gradient a script threw away, as a GradScaler does with one that overflows."""
    bad_samples: int = 0
    """Samples that could not be read and were left out; each counted once."""
    unfinished: int = 0
    """Samples that were handed out and not applied when the run ended; `resume` hands them out
    again."""
    attempt: int = 1
    """How often the run was started; worker_samples, losses, lost workers and times are of this
    attempt, everything else of the whole run."""
    saved: dict[str, float] | None = None
    """Samples and updates of the newest checkpoint, and when it was taken, in Unix seconds."""
    resume: str = ""
    """The command that goes on from that checkpoint; empty where the run is done."""
    exit: str = "failed"
    error: dict[str, str] | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"type": "result", "v": 1, **asdict(self)})

    def write(self, folder: Path) -> None:
        """Write RUN/result.json whole or not at all."""
        part = folder / ".result.json.part"
        part.write_text(self.to_json() + "\n", encoding="utf-8")
        part.rename(folder / "result.json")
