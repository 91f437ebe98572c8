"""Verdict: what the checker has found in the history of a run."""

import json
from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Verdict:
    """Of one run."""

    run: str = ""
    """Its folder."""
    acked: int = 0
    """Parts of pushes that workers were told were applied."""
    lost: int = 0
    """Parts of pushes that shards acknowledged and that are not in the lineage."""
    lost_double_fault: int = 0
    """What the shards themselves count of these."""
    kills: int = 0
    num_left_out: int = 0
    """Kills of the plan that would have lost something, though they were to be spaced."""
    recovery_s: list[float] = field(default_factory=list)
    """From the kill of each shard to its next applied push."""
    unrecovered: int = 0
    """Killed shards that applied nothing any more: they were killed again, or the run ended."""
    dups: int = 0
    """Parts that were sent again and not applied again."""
    applied: int = 0
    """Parts in the lineage."""
    undone: int = 0
    """Parts that were applied and went with their shard, most of them to be applied again."""
    checked: list[str] = field(default_factory=list)
    """Invariants."""
    violations: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """Raises: ValueError, TypeError."""
        return cls(**json.loads(text))
