"""Report: what workers and shards tell the monitor about themselves, about once a second.

    message = header                              header: see wire.py
    worker  -> (no reply)                         a worker's steps since its last report
    shard   -> (no reply)                         what a shard has applied since its last report

Reports are lossy: where the monitor is slow or gone they are thrown away at the sender, and
nobody waits. So each carries its number, from which the monitor counts the holes, and totals beside
what is new. They never take part in training: a report decides nothing.

Times are seconds; those called `at` are of the sender's wall clock, unix time. A column has a
value for each step, worker or round trip, as the field says. The wire has finite numbers alone:
what is not known is UNKNOWN.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from distbelief.param_server import wire
from distbelief.param_server.place import NAME

EVERY_S = 1.0
"""From one report to the next."""
FLEET = 100
"""With more workers each reports less often: the monitor hears about so many of them a second.
What shards tell of each, its pushes and their staleness, stays as often as it is.
"""
STEPS_MAX = 256
"""Steps in one report, the newest; a worker that does more in a second tells no more of them."""
TRIPS_MAX = 512
"""Round trips in one report, the newest."""
WORKERS_MAX = 2048
"""Workers in one shard's report, those with the newest pushes."""

UNKNOWN = -1.0
"""In a column: this was not measured."""


def every_s(num_workers: int) -> float:
    """How often each worker of so many reports."""
    return EVERY_S * max(1.0, num_workers / FLEET)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What every report begins with."""

    run: str
    token: str = field(repr=False)
    name: str
    """w0, w1, ... or shard0, ..."""
    inc: int
    """Incarnation or epoch."""
    n: int
    """1, 2, 3 ... of this process; a hole is a report that was lost."""
    at: float
    span_s: float
    """Since the report before, or since the process began."""
    pid: int
    host: str
    rss_bytes: int
    """Resident memory of the process."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.run) or not NAME.fullmatch(self.name):
            raise ValueError(f"names must match {NAME.pattern}, got {self.run!r} and {self.name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport(Report):
    """A worker's steps, and its round trips to the shards."""

    op: ClassVar[str] = "worker"
    device: str
    num_steps: int
    """Of this incarnation, all that were done."""
    num_samples: int
    """Of this incarnation."""
    busy_s: float
    """How long the step lasts by now that is under way: a worker that hangs shows here."""

    # A value for each step that ended in the span, at most STEPS_MAX.
    end: tuple[float, ...]
    """When it ended, unix time."""
    data_s: tuple[float, ...]
    """Waited for the batch."""
    fetch_s: tuple[float, ...]
    """Waited for parameters: for an answer that brings nothing else, or while those were copied
    that had come with the answer to the push."""
    compute_s: tuple[float, ...]
    """Forward and backward; with a device, also what the push had to wait for it. Of a script, of
    which only the waits are seen, it is the rest of the step."""
    push_s: tuple[float, ...]
    """Waited for the push: made it ready, and waited for its answer. When its last byte has left
    nobody tells, so the way there and the way back are not told apart. With overlap it is what is
    left of it after backward; with fetch_policy `latest` nobody waits, and it is making it ready.
    """
    step_s: tuple[float, ...]
    """The whole step on the wall; the four above are parts of it."""
    samples: tuple[int, ...]
    loss: tuple[float, ...]
    """As it is; `has_loss` says where it is known."""
    has_loss: tuple[bool, ...]
    staleness: tuple[int, ...]
    """Of the push that was answered in this step, as shards have counted it: the largest of its
    parts. `has_push` says where there was one."""
    has_push: tuple[bool, ...]
    version: tuple[int, ...]
    """Smallest version of a part after it."""
    grad_norm: tuple[float, ...]
    """L2 norm of the step's gradient, clipped as it is pushed; UNKNOWN where it is not measured.
    """

    # A value for each round trip that ended in the span, at most TRIPS_MAX.
    trip_shard: tuple[int, ...]
    trip_is_push: tuple[bool, ...]
    trip_s: tuple[float, ...]
    """From the first byte sent to the answer."""

    # A value for each step of which the gradient was computed again on newer parameters.
    meter_staleness: tuple[int, ...]
    """Updates between the parameters of the gradient and those it is held against."""
    meter_cosine: tuple[float, ...]
    """Between the gradient that was pushed and the one on the newer parameters, -1 to 1."""
    meter_gap: tuple[float, ...]
    """Loss of the batch on the newer parameters less the one on its own."""
    meter_rate: tuple[float, ...]
    """Effective learning rate as a share of the nominal one: the pushed gradient's projection on
    the fresh one, over the fresh one's length."""

    sent_bytes: int
    """In the span, and so the next two. What passes through shared memory counts too."""
    received_bytes: int
    retries: int
    """Messages sent again, and hellos said again."""

    def __post_init__(self) -> None:
        Report.__post_init__(self)
        step = (self.end, self.data_s, self.fetch_s, self.compute_s, self.push_s, self.step_s)
        brought = (self.samples, self.loss, self.has_loss, self.staleness, self.has_push)
        for columns in (
            (*step, *brought, self.version, self.grad_norm),
            (self.trip_shard, self.trip_is_push, self.trip_s),
            (self.meter_staleness, self.meter_cosine, self.meter_gap, self.meter_rate),
        ):
            if len(set(map(len, columns))) != 1:
                raise ValueError("columns of unlike length")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport(Report):
    """What a shard has applied, and how it does."""

    op: ClassVar[str] = "shard"
    num_parts: int
    parameters: int
    """Values that it hosts."""
    version: int
    """Smallest of its parts'."""
    updates: int
    """Whole pushes applied since the shard's first epoch: the largest version of its parts."""
    samples: int
    """Applied to its part furthest behind."""
    num_workers: int
    """Workers with a session."""

    # A value for each worker that has pushed or fetched in the span, at most WORKERS_MAX.
    w: tuple[str, ...]
    w_inc: tuple[int, ...]
    base: tuple[int, ...]
    """Smallest version of a part at which it last took the parameters."""
    pushes: tuple[int, ...]
    """Of its pushes in the span, those of which some part was applied."""
    staleness: tuple[int, ...]
    """Largest of a part in the span; 0 where there was no push."""

    # Staleness of parts that were applied in the span: a value, and how many had it.
    stale_value: tuple[int, ...]
    stale_count: tuple[int, ...]
    steady_parts: int
    """Of those, the ones for which the mean is known to be W - 1 (see staleness.py)."""
    steady_sum: int

    queue: int
    """Workers that had something here at once at most, in the span: with one it keeps up."""
    apply_s: tuple[float, ...]
    """Seconds that pushes took to be handled, in the span, the newest 512 at most."""
    busy_share: float
    """Of the span, the share in which it handled messages: 0 to 1."""
    refused_parts: int
    """In the span, and so the next two."""
    sent_bytes: int
    received_bytes: int
    saved: str
    """Name of the newest snapshot on disk; empty if there is none."""
    saved_at: float
    """When that was taken, unix time; 0 for never."""
    save_s: float
    """How long it took to write; 0 for never."""
    storage_error: str

    def __post_init__(self) -> None:
        Report.__post_init__(self)
        for columns in (
            (self.w, self.w_inc, self.base, self.pushes, self.staleness),
            (self.stale_value, self.stale_count),
        ):
            if len(set(map(len, columns))) != 1:
                raise ValueError("columns of unlike length")


AnyReport = WorkerReport | ShardReport

REPORTS = wire.Codec(WorkerReport, ShardReport)
