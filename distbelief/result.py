"""Result: the record that every run leaves, however it ends: RUN/result.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

EXITS = ("done", "stopped", "failed", "degraded", "storage")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of a model on a split, in [0, 1]."""

    split: str
    top1: float
    top5: float | None
    """None below 6 classes."""


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
    refused: int = 0
    """Parts of pushes that the shards refused."""
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
