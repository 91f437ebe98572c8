"""Reports over a real socket: lossy at one end, bounded at the other, and nobody waits."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import zmq

from distbelief.keyring import MONITOR, Keyring
from distbelief.monitor.collector import Collector
from distbelief.param_server.identity import Identity
from distbelief.param_server.report import ShardReport, WorkerReport
from distbelief.param_server.reporter import QUEUE, Head, Reporter, ZmqSender
from distbelief.param_server.traffic import Traffic
from distbelief.param_server.wire import encode
from distbelief.workers.diary import Diary

pytestmark = pytest.mark.integration

TOKEN = "secret"
ME = Identity(run="job", w="w0", inc=1, token=TOKEN)
PATIENCE_S = 5.0


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)  # whatever a test has left open


def make(head: Head) -> WorkerReport:
    return Diary().report(head, 0.0, Traffic())


def reporter_of(sender: ZmqSender, identity: Identity = ME) -> Reporter:
    return Reporter(sender, identity)


def take(collector: Collector, reporter: Reporter) -> WorkerReport | ShardReport:
    """Tell until something arrives: what is sent before the connection stands is lost."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        reporter.tell(make)
        report = collector.recv(0.05)
        if report is not None:
            return report
    raise AssertionError("nothing has arrived")


def test_a_report_arrives_as_it_was_made(context):
    collector = Collector(context, "job", TOKEN)
    reporter = reporter_of(ZmqSender(context, collector.endpoint))
    report = take(collector, reporter)
    assert (report.name, report.inc, report.run) == ("w0", 1, "job")
    assert report.rss_bytes > 2**20
    assert abs(report.at - time.time()) < 60
    reporter.close()
    collector.close()


def test_nobody_there_costs_nothing_but_the_reports(context):
    sender = ZmqSender(context, "tcp://127.0.0.1:9")
    reporter = reporter_of(sender)
    for _ in range(100):
        reporter.tell(make)
    assert reporter.num_dropped == 100
    reporter.close()


def test_a_monitor_that_does_not_read_is_not_waited_for(context):
    collector = Collector(context, "job", TOKEN)
    reporter = reporter_of(ZmqSender(context, collector.endpoint))
    take(collector, reporter)
    some: dict[str, Any] = {
        "trip_shard": (1,) * 500,
        "trip_is_push": (True,) * 500,
        "trip_s": (0.1,) * 500,
    }
    big = replace(make(reporter_head()), **some)
    for _ in range(5000):  # more than two socket buffers take
        reporter.tell(lambda head: replace(big, n=head["n"]))
    assert reporter.num_dropped > QUEUE
    read = 0
    while collector.recv(0.2) is not None:
        read += 1
    assert 0 < read < 5000
    reporter.close()
    collector.close()


def reporter_head() -> Head:
    return Head(
        run="job", token=TOKEN, name="w0", inc=1, n=1, at=1.0, span_s=1.0, pid=1, host="h",
        rss_bytes=0,
    )  # fmt: skip


def test_a_monitor_that_is_back_on_its_port_is_found_again(context):
    collector = Collector(context, "job", TOKEN)
    endpoint = collector.endpoint
    reporter = reporter_of(ZmqSender(context, endpoint))
    take(collector, reporter)
    collector.close()
    port, deadline = int(endpoint.rpartition(":")[2]), time.monotonic() + PATIENCE_S
    while True:  # the port is free again a moment later
        again = Collector(context, "job", TOKEN, wish=port)
        if again.endpoint == endpoint or time.monotonic() > deadline:
            break
        again.close()
    assert again.endpoint == endpoint
    later = take(again, reporter)
    assert later.n > 1
    reporter.close()
    again.close()


@pytest.mark.parametrize(
    ("change", "counted"),
    [({"run": "other"}, "strangers"), ({"token": "guess"}, "strangers")],
)
def test_reports_of_others_are_counted_and_gone(context, change, counted):
    collector = Collector(context, "job", TOKEN)
    sender = ZmqSender(context, collector.endpoint)
    send_until_counted(collector, sender, encode(replace(make(reporter_head()), **change)))
    assert list(collector.counts) == [counted]
    sender.close()
    collector.close()


@pytest.mark.parametrize("junk", [b"", b"\xff" * 40, b"\x80", b"x" * 60_000])
def test_junk_is_counted_and_gone(context, junk):
    collector = Collector(context, "job", TOKEN)
    sender = ZmqSender(context, collector.endpoint)
    send_until_counted(collector, sender, junk)
    assert list(collector.counts) == ["junk"]
    take(collector, reporter_of(sender))
    sender.close()
    collector.close()


def send_until_counted(collector: Collector, sender: ZmqSender, data: bytes) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not collector.counts and time.monotonic() < deadline:
        sender.send(data)
        assert collector.recv(0.05) is None
    time.sleep(0.05)
    while collector.recv(0.0) is not None:
        raise AssertionError("it was taken for a report")


def test_with_keys_only_the_run_s_own_report_and_each_for_itself(context):
    ring = Keyring(["w0", "w1"], ["shard0"])
    collector = Collector(context, "job", TOKEN, keys=ring.of(MONITOR))
    good = reporter_of(ZmqSender(context, collector.endpoint, ring.of("w0")))
    assert take(collector, good).name == "w0"
    clear = ZmqSender(context, collector.endpoint)
    stranger = ZmqSender(context, collector.endpoint, Keyring(["w0"], []).of("w0"))
    other = ZmqSender(context, collector.endpoint, ring.of("w1"))
    send_until_counted(collector, other, encode(make(reporter_head())))
    assert list(collector.counts) == ["strangers"]  # w1 has spoken in w0's name
    for sender in (clear, stranger):
        for _ in range(5):
            assert not sender.send(encode(make(reporter_head())))
            assert collector.recv(0.02) is None
    for sender in (clear, stranger, other):
        sender.close()
    good.close()
    collector.close()


def test_a_value_that_no_field_carries_is_no_report_and_no_error():
    class Never:
        def send(self, data: bytes) -> bool:
            raise AssertionError

        def close(self) -> None: ...

    reporter = Reporter(Never(), ME)
    reporter.tell(lambda head: replace(make(head), busy_s=float("nan")))
    assert reporter.num_dropped == 1
