"""Model: a cluster played by discrete events. Pure: no clock, and the same numbers for a seed.

A worker computes, and pushes its pieces. A piece passes a queue at each station, first come, first
served: the worker's comm and network threads, its host's link out, the latency, the shard host's
link in, the shard's network thread, the shard's own thread, which applies it; its values go back
the same way. Between two stations a piece flows: a link begins to carry what the one before has
begun to send, and ends no sooner. On one host there is no link; in shared memory no network thread
either, and the worker copies what there is when it copies, so that it may see later pushes.

Staleness is counted as shards do: of a piece, the pushes of others between the version that the
gradient was computed on and its apply. Nothing of it is drawn: random are the lengths of steps,
when a worker begins, and failures.

What is simpler than the real thing, for 5,000 workers in seconds:
1. A piece is a message of up to 2 MiB, or several as one (cluster.py); headers have no bytes.
2. A link serves pieces in turn; TCP would share it out among connections.
3. The cores of a host are as many as its threads need.
4. No credits, snapshots, merges of buffers, leases or reports.
5. A failed worker loses what no shard has applied; it is back after `worker_restart_s` and fetches
   at no cost. A failed shard is deaf for `shard_recovery_s` and loses nothing.
"""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from random import Random

from distbelief.simulation.cluster import Cluster
from distbelief.simulation.constants import Constants
from distbelief.simulation.cost import Cost
from distbelief.simulation.stations import Stations


class _Copy:
    """A worker's copy of the parameters: by piece, its version and the own pushes in it."""

    __slots__ = ("own", "version")

    def __init__(self, version: list[int], own: int) -> None:
        self.version = version
        self.own = [own] * len(version)


class _Worker:
    __slots__ = (
        *("accrued", "back_at", "base", "computed", "computes_until", "current", "fetch_due"),
        *("costs", "host", "life", "next", "open", "pushes", "seq", "sent", "slowness", "wants"),
    )

    def __init__(self, host: int, slowness: float, costs: Sequence[Cost]) -> None:
        pieces = len(costs)
        self.host = host
        self.costs = costs
        """By piece."""
        self.slowness = slowness
        self.life = 0
        """Rises when it is lost: what was under way then is void."""
        self.seq = 0
        """Pushes begun."""
        self.open = 0
        """Pieces of the push under way that are not back."""
        self.back_at = 0.0
        """When the last of those that are back were taken in."""
        self.computes_until = 0.0
        self.pushes = 0
        """Since it last asked for values; `fresh`."""
        self.accrued = 0
        """Steps whose gradient has not left; `latest`."""
        self.sent = 0
        """Steps in the push under way."""
        self.computed = 0
        """Steps since a fetch was due; `latest`."""
        self.wants = True
        """The push under way brings parameters back."""
        self.fetch_due = False
        self.current = _Copy([0] * pieces, 0)
        self.next = _Copy([0] * pieces, 0)
        self.base = self.current
        """That the push under way was computed on."""


_PUSH, _SEND, _ARRIVE, _CARRY, _APPLY, _APPLIED, _BACK, _COPIED, _STEP, _DONE = range(10)
_LOST, _RETURN, _SHARD_LOST = range(10, 13)


class Model:
    """See the top of this file."""

    def __init__(self, cluster: Cluster, constants: Constants, seed: int = 0) -> None:
        self.updates = 0
        """Pushes that all shards have answered."""
        self.samples = 0
        self.staleness: Counter[int] = Counter()
        """By parts, as shards count."""
        self.by_worker = [0] * cluster.workers
        """Pushes that were answered."""
        self.waited_s = 0.0
        """Of all workers, for answers."""
        self.lost_workers = self.lost_shards = 0
        self._cluster = cluster
        self._random = Random(seed)
        self._pieces = pieces = cluster.pieces()
        self._versions = [0] * len(pieces)
        """By piece, pushes that wait for the shard's thread or were applied."""
        self._applied_versions = [0] * len(pieces)
        self._parts = [piece.parts for piece in pieces]
        self._shard_of = [piece.shard for piece in pieces]
        self._host_of = [cluster.host_of_shard(piece.shard) for piece in pieces]
        self._heap: list[tuple[float, int, int, int, int, int]] = []
        self._order = 0
        self.shard_threads = Stations(cluster.shards)
        self.shard_nets = Stations(cluster.shards)
        self.worker_nets = Stations(cluster.workers)
        self.links_in = Stations(cluster.hosts)
        self.links_out = Stations(cluster.hosts)
        costs = self._costs(constants)
        self._workers = [
            _Worker(
                cluster.host_of_worker(i), cluster.slowness(i), costs[cluster.host_of_worker(i)]
            )
            for i in range(cluster.workers)
        ]
        self._calls = (
            *(self._push, self._send, self._arrive, self._carry, self._apply, self._applied),
            *(self._back, self._copied, self._step, self._done),
            *(self._lose, self._return, self._lose_shard),
        )
        self._begin()

    def until(self, t: float) -> None:
        """Play up to that time."""
        heap, calls = self._heap, self._calls
        while heap and heap[0][0] <= t:
            now, _, kind, who, piece, life = heappop(heap)
            calls[kind](now, who, piece, life)

    def forget(self) -> None:
        """Count anew, as after the warm-up."""
        self.updates = self.samples = self.lost_workers = self.lost_shards = 0
        self.waited_s = 0.0
        self.staleness.clear()
        self.by_worker = [0] * len(self.by_worker)
        for stations in (
            *(self.shard_threads, self.shard_nets, self.worker_nets),
            *(self.links_in, self.links_out),
        ):
            stations.forget()

    def _begin(self) -> None:
        cluster, draw = self._cluster, self._random
        for i, worker in enumerate(self._workers):
            # As if the run had gone on for long: nobody begins with the others.
            self._start(cluster.steps.mean_s * worker.slowness * draw.random(), i, worker)
            if cluster.worker_mtbf_s < float("inf"):
                self._at(draw.expovariate(1 / cluster.worker_mtbf_s), _LOST, i)
        if cluster.shard_mtbf_s < float("inf"):
            for shard in range(cluster.shards):
                self._at(draw.expovariate(1 / cluster.shard_mtbf_s), _SHARD_LOST, shard)

    def _at(self, t: float, kind: int, who: int, piece: int = 0, life: int = 0) -> None:
        self._order += 1
        heappush(self._heap, (t, self._order, kind, who, piece, life))

    def _costs(self, constants: Constants) -> list[list[Cost]]:
        """By host of workers and piece."""
        near, far = (
            [Cost.of(piece, self._cluster, constants, is_local=is_local) for piece in self._pieces]
            for is_local in (True, False)
        )
        return [
            [
                near_one if host == there else far_one
                for near_one, far_one, there in zip(near, far, self._host_of, strict=True)
            ]
            for host in range(self._cluster.worker_hosts)
        ]

    # A worker.

    def _start(self, now: float, who: int, worker: _Worker) -> None:
        """Begin the steps up to the next push, or with `latest` the next step."""
        cluster = self._cluster
        steps = 1 if cluster.policy == "latest" else cluster.n_push
        draw = cluster.steps.draw
        took = worker.slowness * sum(draw(self._random) for _ in range(steps))
        end = now + took
        if cluster.policy == "latest":
            self._at(end, _STEP, who, life=worker.life)
        elif cluster.overlaps:
            worker.computes_until = end
            self._begin_push(worker, 1, wants=True)
            # Near the loss first: the last pieces of the vector.
            first, num = end - cluster.backward * took, len(self._pieces)
            for turn in range(num):
                at = first + (end - first) * (turn + 1) / num
                self._at(at, _SEND, who, num - 1 - turn, worker.life)
        else:
            worker.computes_until = end
            self._at(end, _PUSH, who, life=worker.life)

    def _begin_push(self, worker: _Worker, steps: int, *, wants: bool) -> None:
        worker.seq += 1
        worker.open, worker.sent, worker.wants = len(self._pieces), steps, wants
        worker.base, worker.back_at = worker.current, 0.0

    def _push(self, now: float, who: int, _: int, life: int) -> None:
        """`fresh`: all pieces leave at once."""
        worker = self._workers[who]
        if worker.life != life:
            return
        worker.pushes += 1
        wants = worker.pushes >= self._cluster.per_fetch
        if wants:
            worker.pushes = 0
        self._begin_push(worker, self._cluster.n_push, wants=wants)
        for piece in reversed(range(len(self._pieces))):
            self._send(now, who, piece, life)

    def _step(self, now: float, who: int, _: int, life: int) -> None:
        """`latest`: a step has ended; nobody waits."""
        worker, cluster = self._workers[who], self._cluster
        if worker.life != life:
            return
        worker.accrued += 1
        worker.computed += 1
        if worker.computed >= cluster.n_fetch:
            worker.computed, worker.fetch_due = 0, True
        base = worker.current
        is_free = not worker.open and worker.back_at <= now
        if is_free and worker.sent:
            self._count(who, worker)
        if is_free and worker.accrued >= cluster.n_push:
            self._begin_push(worker, worker.accrued, wants=worker.fetch_due)
            worker.base = base  # not what has just been turned to
            worker.accrued, worker.fetch_due = 0, False
            for piece in reversed(range(len(self._pieces))):
                self._send(now, who, piece, life)
        self._start(now, who, worker)

    def _count(self, who: int, worker: _Worker) -> None:
        """The push under way was answered."""
        self.updates += 1
        self.by_worker[who] += 1
        self.samples += worker.sent * self._cluster.batch
        worker.sent = 0
        if worker.wants:
            worker.current, worker.next = worker.next, worker.current

    def _done(self, now: float, who: int, _: int, life: int) -> None:
        """`fresh`: all answers are there."""
        worker = self._workers[who]
        if worker.life == life:
            self.waited_s += now - worker.computes_until
            self._count(who, worker)
            self._start(now, who, worker)

    # A piece, there.

    def _send(self, now: float, who: int, piece: int, life: int) -> None:
        worker = self._workers[who]
        if worker.life != life:
            return
        cost = worker.costs[piece]
        busy = max(cost.worker_s, cost.net_s)
        if cost.is_local:
            # What is shared is not sent: the worker's part of it is the copying of the answer.
            end = self.worker_nets.take(who, now, busy) + busy if cost.net_s else now
            self._at(end + cost.hop_s, _ARRIVE, who, piece, life)
            return
        start = self.worker_nets.take(who, now, busy)
        begin = self.links_out.take(worker.host, start, cost.link_s)
        slow = max(0.0, busy - cost.link_s)  # the link waits for what it is given
        self._at(begin + slow + cost.hop_s, _ARRIVE, who, piece, life)

    def _arrive(self, now: float, who: int, piece: int, life: int) -> None:
        """Its first byte is there."""
        cost = self._workers[who].costs[piece]
        start = now
        if not cost.is_local:
            start = self.links_in.take(self._host_of[piece], now, cost.link_s)
        if start > now:
            self._at(start, _CARRY, who, piece, life)
        else:
            self._carry(now, who, piece, life)

    def _carry(self, now: float, who: int, piece: int, life: int) -> None:
        """The network thread of the shard takes it in, while it comes."""
        cost = self._workers[who].costs[piece]
        if not cost.net_s:
            self._apply(now, who, piece, life)
            return
        start = self.shard_nets.take(self._shard_of[piece], now, cost.net_s)
        end = max(start + cost.net_s, now + cost.link_s)
        self._at(end, _APPLY, who, piece, life)

    def _apply(self, now: float, who: int, piece: int, life: int) -> None:
        """It is whole, and waits for the shard's thread."""
        worker = self._workers[who]
        if worker.life != life:
            return  # it ended with its worker
        cost = worker.costs[piece]
        start = self.shard_threads.take(self._shard_of[piece], now, cost.shard_s)
        # The order in which they come is the order in which they are applied.
        version, base = self._versions[piece], worker.base
        stale = version - base.version[piece] - (worker.seq - 1 - base.own[piece])
        self.staleness[stale] += self._parts[piece]
        self._versions[piece] = version + 1
        if worker.wants:
            worker.next.version[piece] = version + 1
            worker.next.own[piece] = worker.seq
        self._at(start + cost.shard_s, _APPLIED, who, piece, life)

    # A piece, back.

    def _applied(self, now: float, who: int, piece: int, life: int) -> None:
        self._applied_versions[piece] += 1
        worker = self._workers[who]
        if worker.life != life:
            return
        cost = worker.costs[piece]
        if not worker.wants:
            self._take(now + cost.hop_s, who, worker)
            return
        if cost.is_local and not cost.net_s:
            self._at(now + cost.hop_s, _BACK, who, piece, life)
            return
        start = self.shard_nets.take(self._shard_of[piece], now, cost.net_s)
        if cost.is_local:
            self._at(start + cost.net_s + cost.hop_s, _BACK, who, piece, life)
            return
        begin = self.links_out.take(self._host_of[piece], start, cost.link_s)
        slow = max(0.0, cost.net_s - cost.link_s)
        self._at(begin + slow + cost.hop_s, _BACK, who, piece, life)

    def _back(self, now: float, who: int, piece: int, life: int) -> None:
        """The first byte of its values is there; in shared memory all of them."""
        worker = self._workers[who]
        if worker.life != life:
            return
        cost = worker.costs[piece]
        busy = max(cost.worker_s, cost.net_s)
        if cost.is_local:
            shares = not cost.net_s
            # The shared figure is of both ways; there is but one.
            busy = 2 * cost.worker_s if shares else busy
            end = self.worker_nets.take(who, now, busy) + busy
            if shares:
                self._at(end, _COPIED, who, piece, life)
            else:
                self._take(end, who, worker)
            return
        link = self.links_in.take(worker.host, now, cost.link_s)
        start = self.worker_nets.take(who, link, busy)
        self._take(max(start + busy, link + cost.link_s), who, worker)

    def _copied(self, now: float, who: int, piece: int, life: int) -> None:
        """What there is now was copied, with what others have pushed since the answer."""
        worker = self._workers[who]
        if worker.life == life:
            worker.next.version[piece] = self._applied_versions[piece]
            self._take(now, who, worker)

    def _take(self, end: float, who: int, worker: _Worker) -> None:
        """The worker will have a piece."""
        worker.back_at = max(worker.back_at, end)
        worker.open -= 1
        if not worker.open and self._cluster.policy == "fresh":
            end = max(worker.back_at, worker.computes_until)
            self._at(end, _DONE, who, life=worker.life)

    # What fails.

    def _lose(self, now: float, who: int, _: int, life: int) -> None:
        worker = self._workers[who]
        self.lost_workers += 1
        worker.life += 1
        self._at(now + self._cluster.worker_restart_s, _RETURN, who)

    def _return(self, now: float, who: int, _: int, life: int) -> None:
        """A new incarnation begins with the values of now, and no pushes."""
        worker = self._workers[who]
        worker.seq = worker.open = worker.pushes = 0
        worker.accrued = worker.sent = worker.computed = 0
        worker.back_at, worker.fetch_due = 0.0, False
        worker.current = _Copy(self._applied_versions[:], 0)
        worker.next = _Copy(self._applied_versions[:], 0)
        self._start(now, who, worker)
        self._at(now + self._random.expovariate(1 / self._cluster.worker_mtbf_s), _LOST, who)

    def _lose_shard(self, now: float, shard: int, _: int, life: int) -> None:
        self.lost_shards += 1
        threads, cluster = self.shard_threads, self._cluster
        threads.free_at[shard] = max(threads.free_at[shard], now) + cluster.shard_recovery_s
        again = now + cluster.shard_recovery_s
        self._at(again + self._random.expovariate(1 / cluster.shard_mtbf_s), _SHARD_LOST, shard)
