"""What a shard tells the monitor of what it has handled: counted by hand beside it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from distbelief.param_server.protocol import SHARED, Ack, Fetch, Push
from distbelief.param_server.register import APPLY_MAX, VALUES_MAX, Register, Saving
from distbelief.param_server.report import REPORTS, WORKERS_MAX, ShardReport
from distbelief.param_server.reporter import Head
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Shard
from distbelief.param_server.wire import HEADER_MAX, encode
from tests.param_server.jobs import RUN, TOKEN, Peer, ready_shard

HEAD = Head(
    run=RUN, token=TOKEN, name="shard0", inc=1, n=1, at=1.8e9, span_s=1.0, pid=7, host="h",
    rss_bytes=1,
)  # fmt: skip
GRADS = {0: torch.ones(64), 1: torch.ones(64), 2: torch.ones(59)}


class Desk:
    """A shard of three parts with its register, and workers who speak to it."""

    def __init__(self, workers: int) -> None:
        self.shard, self.peers = ready_shard(num_workers=workers, workers=workers)
        self.register = Register(self.shard)
        self.bases = [[0, 0, 0] for _ in range(workers)]
        self.seqs = [0] * workers

    def handle(self, i: int, message, payload=(), *, has_waited: bool = True, seconds=0.01) -> Any:
        replies: list[Any] = []  # a test knows which message it expects

        def note(request, reply) -> None:
            replies.append(reply.message)
            sizes = sum(memoryview(frame).nbytes for frame in payload), 5
            self.register.note(request, reply.message, seconds, sizes, has_waited=has_waited)

        frames = [encode(message), *payload]
        respond(self.shard, self.peers[i].connection, frames, 0.0, on_handled=note).release()
        return replies[0]

    def push(self, i: int, grads=None, *, fetch: bool = True, **how) -> Any:
        self.seqs[i] += 1
        grads = grads or GRADS
        base = tuple(self.bases[i][part] for part in grads)
        message, payload = self.peers[i].make_push(grads, self.seqs[i], base=base, fetch=fetch)
        ack = self.handle(i, message, payload, **how)
        if fetch:
            for part, version in zip(ack.part, ack.version, strict=True):
                self.bases[i][part] = version
        return ack

    def report(self) -> ShardReport:
        return self.register.report(HEAD, Saving())


def test_staleness_is_told_by_worker_and_by_value():
    desk = Desk(2)
    desk.push(0)
    desk.push(1)  # one push of w0 was in between
    desk.push(1)
    desk.push(0)  # and two of w1
    report = desk.report()
    assert (report.w, report.w_inc) == (("w1", "w0"), (1, 1))  # the newest last
    assert (report.pushes, report.staleness) == ((2, 2), (1, 2))
    assert report.base == (3, 4)
    assert dict(zip(report.stale_value, report.stale_count, strict=True)) == {0: 6, 1: 3, 2: 3}
    assert (report.updates, report.version, report.samples) == (4, 4, 4)
    assert (report.num_parts, report.parameters, report.num_workers) == (3, 187, 2)


def test_a_report_holds_what_came_since_the_one_before():
    desk, told = Desk(3), Counter[int]()
    steady = [0, 0]
    for round_ in range(6):
        for i in range(3):
            desk.push((i + round_) % 3)
        report = desk.report()
        told.update(dict(zip(report.stale_value, report.stale_count, strict=True)))
        steady = [steady[0] + report.steady_parts, steady[1] + report.steady_sum]
        assert sum(report.pushes) == 3
    assert told == desk.shard.staleness.counts
    assert steady == [desk.shard.staleness.steady_pushes, desk.shard.staleness.steady_sum]
    assert steady[0] > 0
    idle = desk.report()
    assert (idle.w, idle.stale_value, idle.apply_s, idle.busy_share) == ((), (), (), 0.0)


def test_what_was_counted_before_a_restore_is_not_told_again():
    desk = Desk(2)
    for i in (0, 1, 1, 0):
        desk.push(i)
    assert sum(desk.report().stale_count) == 12
    image = desk.shard.image()
    restored = Shard(replace(desk.shard.config, epoch=2), image)
    assert sum(restored.staleness.counts.values()) == 12
    desk.shard, desk.register = restored, Register(restored)
    desk.peers = [Peer(restored, peer.w, ep=2) for peer in desk.peers]
    report = desk.report()
    assert (report.stale_value, report.steady_parts, report.steady_sum) == ((), 0, 0)
    assert (report.updates, report.samples, report.num_workers) == (4, 4, 2)
    for peer in desk.peers:
        peer.hello(image.contract)
    desk.push(0)
    report = desk.report()
    assert dict(zip(report.stale_value, report.stale_count, strict=True)) == {0: 3}
    assert (report.w, report.pushes, report.updates) == (("w0",), (1,), 5)
    image.release()


def test_the_base_is_what_a_worker_has_not_what_it_pushed():
    desk = Desk(2)
    desk.push(0, fetch=False)
    desk.push(1)
    report = desk.report()
    assert dict(zip(report.w, report.base, strict=True)) == {"w0": 0, "w1": 2}
    fetch = Fetch(**desk.peers[0].who, part=(0, 1, 2))
    desk.handle(0, fetch)
    assert desk.report().base == (2,)


def test_a_push_of_which_some_part_was_refused_is_a_push_and_is_counted():
    desk = Desk(1)
    desk.push(0, {**GRADS, 1: torch.full((64,), float("nan"))})
    report = desk.report()
    assert (report.pushes, report.refused_parts) == ((1,), 1)
    desk.push(0, {0: torch.full((64,), float("inf"))})
    report = desk.report()
    assert (report.pushes, report.refused_parts) == ((0,), 1)


def test_a_push_that_comes_in_several_messages_is_one():
    desk = Desk(1)
    for _ in range(2):
        for part in (2, 1, 0):
            desk.push(0, {part: GRADS[part]}, has_waited=False)
            desk.seqs[0] -= part > 0
    report = desk.report()
    assert (report.pushes, report.staleness, report.queue) == ((2,), (0,), 1)
    assert sum(report.stale_count) == 6


def test_a_push_that_is_said_again_is_not_counted_again():
    desk = Desk(1)
    desk.push(0)
    desk.report()
    desk.seqs[0] -= 1  # its answer was lost
    desk.bases[0] = [0, 0, 0]
    assert set(desk.push(0).status) == {"dup"}
    report = desk.report()
    assert (report.w, report.pushes, report.refused_parts) == (("w0",), (0,), 0)
    assert (report.stale_value, report.updates) == ((), 1)


def test_a_new_incarnation_begins_anew():
    desk = Desk(1)
    desk.push(0)
    desk.register._seen["w0"].inc = 7  # of another process
    desk.push(0)
    report = desk.report()
    assert (report.w_inc, report.pushes) == ((1,), (1,))


def test_time_and_bytes_are_of_the_span():
    desk = Desk(1)
    for _ in range(3):
        desk.push(0, seconds=0.2)
    report = desk.report()
    assert report.apply_s == (0.2, 0.2, 0.2)
    assert report.busy_share == pytest.approx(0.6)
    assert (report.received_bytes, report.sent_bytes) == (3 * 4 * 187, 15)
    assert desk.report().received_bytes == 0


def test_what_passes_through_shared_memory_counts_by_its_parts():
    desk = Desk(1)
    push = replace(push_of(desk), dt=SHARED, crc=(), numel=())
    ack = replace(desk.push(0, fetch=False), version=(1, 1, 1))
    desk.report()
    desk.register.note(push, ack, 0.1, (0, 0), has_waited=True)
    report = desk.report()
    assert (report.received_bytes, report.sent_bytes) == (4 * 187, 4 * 187)
    assert report.base == (1,)


def test_a_stranger_who_names_parts_that_are_not_here_is_refused_and_nothing_else():
    desk = Desk(1)
    message, _ = desk.peers[0].make_push(GRADS, 1)
    odd = replace(message, w="w9", dt=SHARED, part=(0, 1, 999), crc=(), numel=())
    assert not isinstance(desk.handle(0, odd), Ack)
    report = desk.report()
    assert (report.w, report.apply_s, report.received_bytes) == ((), (), 0)


def test_the_queue_is_what_was_there_at_once():
    desk = Desk(3)
    for i in range(3):
        desk.push(i, has_waited=i == 0)
    assert desk.report().queue == 3
    for _ in range(5):  # one worker alone is never there twice: it waits for its answer
        desk.push(0, has_waited=False)
    assert desk.report().queue == 1
    assert desk.report().queue == 0


def test_the_largest_report_fits_into_a_message():
    desk = Desk(1)
    for i in range(2 * WORKERS_MAX):
        desk.register._seen[f"w{i}"] = type(desk.register._see(push_of(desk), 0))(
            60_000, 2**32 - 1, 200, 60_000
        )
    for value in range(2 * VALUES_MAX):
        desk.shard.staleness.counts[value] = 60_000
    for _ in range(2 * APPLY_MAX):
        desk.register._apply_s.append(0.1)
    data = encode(desk.report())
    assert len(data) <= HEADER_MAX
    report = REPORTS.decode(data)
    assert isinstance(report, ShardReport)
    assert len(report.w) == WORKERS_MAX
    assert report.w[-1] == f"w{2 * WORKERS_MAX - 1}"
    assert len(report.stale_value) == VALUES_MAX


def push_of(desk: Desk) -> Push:
    message, _ = desk.peers[0].make_push(GRADS, 1)
    assert isinstance(message, Push)
    return message
