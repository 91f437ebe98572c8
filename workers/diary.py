"""Diary: a worker's steps as it lived them, for its reports to the monitor. No clock, no socket.

A step begins where the one before it ended. What is noted of it are waits; what they leave is
`compute` for a script, whose code we do not see, and is measured in our own loop.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from distbelief.param_server.report import STEPS_MAX, UNKNOWN, WorkerReport
from distbelief.param_server.reporter import Head
from distbelief.param_server.traffic import Traffic
from distbelief.workers.exchange import Exchange
from distbelief.workers.meter import Measurement
from distbelief.workers.staging import Reading

METER_MAX = 64


@dataclass(slots=True)
class _Step:
    end: float
    seconds: float
    data: float
    fetch: float
    compute: float
    push: float
    samples: int
    staleness: int | None
    version: int
    loss: Reading | None
    grad_norm: Reading | None

    @property
    def is_known(self) -> bool:
        return all(one is None or one.is_there for one in (self.loss, self.grad_norm))


@dataclass(slots=True)
class Diary:
    """See the top of this file. Used by the training thread. Times are seconds on any clock."""

    device: str = "cpu"
    num_steps: int = 0
    num_samples: int = 0
    _began_at: float | None = None
    _data_s: float = 0.0
    _compute_s: float | None = None
    _steps: deque[_Step] = field(default_factory=lambda: deque(maxlen=STEPS_MAX))
    """To be told."""
    _measured: deque[Measurement] = field(default_factory=lambda: deque(maxlen=METER_MAX))
    _traffic: tuple[int, int, int] = (0, 0, 0)
    """Bytes sent, received, and retries, as they were at the last report."""

    def begin(self, now: float) -> None:
        """The first step begins; later ones follow each other."""
        if self._began_at is None:
            self._began_at = now

    def skip(self, now: float) -> None:
        """What was since the last step was none: there was no work."""
        self._began_at, self._data_s, self._compute_s = now, 0.0, None

    def wait_for_data(self, seconds: float) -> None:
        """A batch was waited for."""
        self._data_s += seconds

    def compute(self, seconds: float) -> None:
        """Forward and backward, where they are seen."""
        self._compute_s = (self._compute_s or 0.0) + seconds

    def end(
        self,
        now: float,
        wall: float,
        exchange: Exchange,
        samples: int,
        staleness: int | None,
        version: int,
        loss: Reading | None = None,
        grad_norm: Reading | None = None,
    ) -> None:
        """A step ends.

        wall: unix time. staleness: of the push that was answered in it; None where none was.
        loss, grad_norm: of it; the step is told once they are there.
        """
        began, self._began_at = self._began_at, now
        seconds = max(0.0, now - (now if began is None else began))
        rest = max(0.0, seconds - self._data_s - exchange.seconds)
        compute = rest if self._compute_s is None else min(self._compute_s, rest)
        self._steps.append(
            _Step(
                end=wall,
                seconds=seconds,
                data=self._data_s,
                fetch=exchange.fetch_s,
                compute=compute + exchange.device_s,
                push=max(0.0, exchange.seconds - exchange.fetch_s - exchange.device_s),
                samples=samples,
                staleness=staleness,
                version=version,
                loss=loss,
                grad_norm=grad_norm,
            )
        )
        self.num_steps += 1
        self.num_samples += samples
        self._data_s, self._compute_s = 0.0, None

    def measure(self, one: Measurement) -> None:
        """The meter has looked at a step."""
        if all(map(math.isfinite, one)):
            self._measured.append(one)

    def report(self, head: Head, now: float, traffic: Traffic) -> WorkerReport:
        """What has come since the last one."""
        steps, measured = self._take_steps(), list(self._measured)
        self._measured.clear()
        losses, norms = [_value(s.loss) for s in steps], [_value(s.grad_norm) for s in steps]
        trips = traffic.take_trips()
        counts = (traffic.sent_bytes, traffic.received_bytes, traffic.retries)
        sent, received, retries = (a - b for a, b in zip(counts, self._traffic, strict=True))
        self._traffic = counts
        return WorkerReport(
            **head,
            device=self.device,
            num_steps=self.num_steps,
            num_samples=self.num_samples,
            busy_s=0.0 if self._began_at is None else max(0.0, now - self._began_at),
            end=tuple([s.end for s in steps]),
            data_s=tuple([s.data for s in steps]),
            fetch_s=tuple([s.fetch for s in steps]),
            compute_s=tuple([s.compute for s in steps]),
            push_s=tuple([s.push for s in steps]),
            step_s=tuple([s.seconds for s in steps]),
            samples=tuple([s.samples for s in steps]),
            loss=tuple([0.0 if loss is None else loss for loss in losses]),
            has_loss=tuple([loss is not None for loss in losses]),
            staleness=tuple([s.staleness or 0 for s in steps]),
            has_push=tuple([s.staleness is not None for s in steps]),
            version=tuple([s.version for s in steps]),
            grad_norm=tuple([UNKNOWN if norm is None else norm for norm in norms]),
            trip_shard=tuple([t.shard for t in trips]),
            trip_is_push=tuple([t.is_push for t in trips]),
            trip_s=tuple([t.seconds for t in trips]),
            meter_staleness=tuple([m.updates for m in measured]),
            meter_cosine=tuple([m.cosine for m in measured]),
            meter_gap=tuple([m.gap for m in measured]),
            meter_rate=tuple([m.rate for m in measured]),
            sent_bytes=sent,
            received_bytes=received,
            retries=retries,
        )

    def _take_steps(self) -> list[_Step]:
        """Those of which all is known: a device computes it later, and nobody waits for it here."""
        taken = []
        while self._steps and self._steps[0].is_known:
            taken.append(self._steps.popleft())
        return taken


def _value(reading: Reading | None) -> float | None:
    """None for what is not measured, or not finite."""
    return None if reading is None or not math.isfinite(reading.value) else reading.value
