"""Cluster: what a forecast is asked about: machines, links, and the job on them. Nothing is played.

Pieces are what the model moves: the messages of a push, as client.py cuts them, or several of them
as one where they would be more than PIECES_MAX. A piece has one version, as its parts have.
"""

import math
from dataclasses import dataclass
from typing import Literal

from distbelief.simulation.constants import FORMS, SHRINK
from distbelief.simulation.steps import Steps

PIECES_MAX = 32
"""Of a push, or one a shard where those are more."""
LINE_SHARE = 0.94
"""Of a link's rate is left for what TCP carries, with frames of 1,500 bytes."""

# As in param_server/layout.py, client.py and partition.py, which load torch; a test compares.
PARTS_AIM, PART_STEP, PART_MAX = 16, 64, 2**18
MESSAGE_PARTS, MESSAGE_BYTES, MESSAGES_MAX = 4, 2 * 2**20, 32
PARTS_OF_SHARD_MAX = 1024

Policy = Literal["fresh", "latest"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Parts of one shard that travel together."""

    shard: int
    parts: int
    numel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines and a job. Raises: ValueError naming what makes no sense."""

    workers: int
    shards: int
    parameters: int
    steps: Steps
    batch: int = 32
    """Samples of a step."""
    n_fetch: int = 1
    n_push: int = 1
    policy: Policy = "fresh"
    stragglers: int = 0
    factor: float = 1.0
    """How many times as long their steps are."""
    per_host: int = 1
    """Workers of one host; they share its link."""
    shards_per_host: int = 1
    is_apart: bool = True
    """Shards are on hosts of their own; else in turn on those of the workers."""
    link_gbit: float = 10.0
    """Of each host, each way."""
    latency_s: float = 1e-4
    """One way between two hosts."""
    form: str = "float32"
    """Of gradients and parameters between hosts."""
    is_encrypted: bool = True
    """Between hosts."""
    shares_memory: bool = True
    """Workers and shards of one host; else they use TCP."""
    backward: float = 0.0
    """Share of a step in which parts leave already, near the loss first; fresh, with n_fetch =
    n_push = 1, alone."""
    worker_mtbf_s: float = math.inf
    """Mean time of one worker between two failures."""
    worker_restart_s: float = 10.0
    shard_mtbf_s: float = math.inf
    shard_recovery_s: float = 5.0

    def __post_init__(self) -> None:
        counts = ("workers", "shards", "parameters", "batch", "n_fetch", "n_push")
        for name in (*counts, "per_host", "shards_per_host"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_fetch % self.n_push:
            raise ValueError(f"n_fetch {self.n_fetch} is no multiple of n_push {self.n_push}")
        if self.policy not in ("fresh", "latest"):
            raise ValueError(f"policy {self.policy!r} is neither fresh nor latest")
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is none of {', '.join(FORMS)}")
        if not 0 <= self.stragglers <= self.workers:
            raise ValueError(f"{self.stragglers} stragglers among {self.workers} workers")
        if self.shards > self.num_parts:
            raise ValueError(
                f"{self.shards} shards for {self.parameters:,} parameters, which are "
                f"{self.num_parts} parts: at most {self.num_parts}"
            )
        positive = ("factor", "link_gbit", "worker_mtbf_s", "shard_mtbf_s")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("latency_s", "worker_restart_s", "shard_recovery_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.backward < 1:
            raise ValueError(f"backward must be from 0 to below 1, got {self.backward}")

    @property
    def per_fetch(self) -> int:
        """Pushes from one fetch to the next."""
        return self.n_fetch // self.n_push

    @property
    def overlaps(self) -> bool:
        return self.backward > 0 and self.policy == "fresh" and self.n_fetch == self.n_push == 1

    @property
    def part_numel(self) -> int:
        """Length of every part but the last."""
        aim = -(-self.parameters // PARTS_AIM)
        return min(max(-(-aim // PART_STEP) * PART_STEP, PART_STEP), PART_MAX)

    @property
    def num_parts(self) -> int:
        """More shards than these have nothing to hold."""
        return -(-self.parameters // self.part_numel)

    @property
    def worker_hosts(self) -> int:
        return -(-self.workers // self.per_host)

    @property
    def shard_hosts(self) -> int:
        wanted = -(-self.shards // self.shards_per_host)
        return wanted if self.is_apart else min(wanted, self.worker_hosts)

    @property
    def hosts(self) -> int:
        return self.worker_hosts + (self.shard_hosts if self.is_apart else 0)

    def host_of_worker(self, worker: int) -> int:
        return worker // self.per_host

    def host_of_shard(self, shard: int) -> int:
        return (self.worker_hosts if self.is_apart else 0) + shard % self.shard_hosts

    @property
    def link_bytes_per_s(self) -> float:
        return LINE_SHARE * self.link_gbit * 1e9 / 8

    @property
    def push_bytes(self) -> float:
        """Of a whole push on the wire; a whole fetch has as many."""
        return 4 * self.parameters / SHRINK[self.form]

    def slowness(self, worker: int) -> float:
        """How many times as long the steps of a worker are."""
        return self.factor if worker < self.stragglers else 1.0

    @property
    def pushes_per_s(self) -> float:
        """That the workers would make if they never waited, all of them together."""
        even = self.workers - self.stragglers + self.stragglers / self.factor
        return even / (self.steps.mean_s * self.n_push)

    def pieces(self) -> tuple[Piece, ...]:
        """What a push consists of, in the order of the vector."""
        cut: list[Piece] = []
        for shard in range(self.shards):
            first = -(-shard * self.num_parts // self.shards)
            last = -(-(shard + 1) * self.num_parts // self.shards)
            length = self._length(last - first)
            for start in range(first, last, length):
                stop = min(start + length, last)
                numel = min(stop * self.part_numel, self.parameters) - start * self.part_numel
                cut.append(Piece(shard, stop - start, numel))
        return tuple(cut)

    def _length(self, parts: int) -> int:
        """Of a piece, in parts."""
        if self.hosts == 1 and self.shares_memory:
            # A busy shard is sent one message, one that has nothing else to do four.
            return parts if self.workers > 1 else -(-parts // 4)
        usual = min(MESSAGE_PARTS, max(1, MESSAGE_BYTES // (4 * self.part_numel)))
        at_most = max(1, PIECES_MAX // self.shards)
        return max(usual, -(-parts // MESSAGES_MAX), -(-parts // at_most))
