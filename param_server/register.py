"""Register: what a shard tells the monitor of the messages it has handled. No clock, no socket.

Nothing here decides anything: it looks at requests and their replies after they were made.
"""

from collections import Counter, deque
from dataclasses import dataclass

from distbelief.param_server.protocol import SHARED, Ack, AnyReply, AnyRequest, Fetch, Params, Push
from distbelief.param_server.report import WORKERS_MAX, ShardReport
from distbelief.param_server.reporter import Head
from distbelief.param_server.shard import Shard
from distbelief.param_server.staleness import Staleness

APPLY_MAX = 512
"""Times of pushes in one report, the newest."""
VALUES_MAX = 1024
"""Values of staleness in one report; beyond that the rare ones are left out."""


@dataclass(slots=True)
class _Seen:
    """A worker in the span."""

    inc: int
    base: int
    pushes: int = 0
    staleness: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """The newest snapshot, for a report."""

    name: str = ""
    at: float = 0.0
    """Unix time."""
    seconds: float = 0.0
    error: str = ""


class _Sizes(dict[int, int]):
    """Values of each part, looked up once."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._shard = shard

    def __missing__(self, index: int) -> int:
        self[index] = numel = self._shard.parts[index].range.numel
        return numel


class Register:
    """See the top of this file. Used by the shard's thread."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._sizes = _Sizes(shard)
        self._seen: dict[str, _Seen] = {}
        self._apply_s: deque[float] = deque(maxlen=APPLY_MAX)
        self._busy_s = 0.0
        self._sent_bytes = self._received_bytes = 0
        self._queue = 0
        self._counted: dict[str, int] = {}
        """By worker, the push that was counted last."""
        self._run: dict[str, int] = {}
        """Since it last had to wait: by worker, the push that was handled last."""
        self._before = Staleness.merged([shard.staleness])
        """As it was at the last report."""
        self._refused_before = 0

    def note(
        self,
        request: AnyRequest,
        reply: AnyReply,
        seconds: float,
        payload_bytes: tuple[int, int],
        *,
        has_waited: bool,
    ) -> None:
        """A message was handled.

        seconds: that it took. payload_bytes: received and sent. has_waited: it was not there yet
        when the one before it was done.
        """
        self._busy_s += seconds
        received, sent = payload_bytes
        if isinstance(request, Push):
            self._count_run(request.w, request.seq, has_waited)
            if isinstance(reply, Ack):  # so it was of our own parts
                self._apply_s.append(seconds)
                is_shared = request.dt == SHARED
                if is_shared:  # read and written where it lies
                    received = sent = 4 * sum(map(self._sizes.__getitem__, request.part))
                # With the answer it has the parameters: in it, or to be read in shared memory.
                has_fetched = request.fetch or is_shared
                seen = self._see(request, min(reply.version if has_fetched else request.base))
                if "applied" in reply.status and self._counted.get(request.w) != request.seq:
                    self._counted[request.w] = request.seq  # it may come in several messages
                    seen.pushes += 1
                seen.staleness = max(seen.staleness, max(reply.staleness))
        else:
            self._count_run(request.w, 0, has_waited)
            if isinstance(request, Fetch) and isinstance(reply, Params):
                self._see(request, min(reply.version))
        self._received_bytes += received
        self._sent_bytes += sent

    def report(self, head: Head, saving: Saving) -> ShardReport:
        """What has come since the last one."""
        shard = self._shard
        now, before = shard.staleness, self._before
        new = Counter(now.counts)
        new.subtract(before.counts)
        values = sorted((v for v, n in new.items() if n > 0), key=lambda v: -new[v])[:VALUES_MAX]
        refused = sum(
            shard.counts[word]
            for word in ("nonfinite", "norm", "numel", "form", "checksum", "base", "conflict")
        )
        newest = list(self._seen.items())[-WORKERS_MAX:]
        span = head["span_s"]
        report = ShardReport(
            **head,
            num_parts=len(shard.parts),
            parameters=sum(part.range.numel for part in shard.parts.values()),
            version=shard.version,
            updates=max((part.version for part in shard.parts.values()), default=0),
            samples=min((part.samples for part in shard.parts.values()), default=0),
            num_workers=shard.num_workers,
            w=tuple([name for name, _ in newest]),
            w_inc=tuple([one.inc for _, one in newest]),
            base=tuple([one.base for _, one in newest]),
            pushes=tuple([one.pushes for _, one in newest]),
            staleness=tuple([one.staleness for _, one in newest]),
            stale_value=tuple(values),
            stale_count=tuple([new[v] for v in values]),
            steady_parts=max(0, now.steady_pushes - before.steady_pushes),
            steady_sum=max(0, now.steady_sum - before.steady_sum),
            queue=self._queue,
            apply_s=tuple(self._apply_s),
            busy_share=min(1.0, self._busy_s / span) if span > 0 else 0.0,
            refused_parts=max(0, refused - self._refused_before),
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes,
            saved=saving.name,
            saved_at=saving.at,
            save_s=saving.seconds,
            storage_error=saving.error,
        )
        self._before = Staleness.merged([now])
        self._refused_before = refused
        self._seen.clear()
        self._apply_s.clear()
        self._busy_s = 0.0
        self._sent_bytes = self._received_bytes = self._queue = 0
        return report

    def _see(self, request: AnyRequest, base: int) -> _Seen:
        seen = self._seen.pop(request.w, None)
        if seen is None or seen.inc != request.inc:
            seen = _Seen(request.inc, base)
        seen.base = base
        self._seen[request.w] = seen  # the newest is the last one
        return seen

    def _count_run(self, w: str, seq: int, has_waited: bool) -> None:
        """Workers whose messages are handled one after the other without a wait were there at
        once, at most: until one comes with its next push, for which it had to be answered."""
        run = self._run
        if has_waited or run.get(w, seq) < seq:
            run.clear()
        run[w] = seq
        if len(run) > self._queue:
            self._queue = len(run)
