"""Standby: the controller's process is killed, frozen, cut off; the copy goes on where it was."""

import os
import signal
import threading
import time
from dataclasses import asdict

import pytest
import zmq

from distbelief.controller import standby as standby_module
from distbelief.controller.entry import Admit, Lose
from distbelief.controller.machine import CONTROLLER, Controller
from distbelief.controller.standby import Standby
from distbelief.job import NetConfig
from distbelief.param_server.transport import ZmqClient
from distbelief.problem import Problem
from distbelief.workers.control import Control
from distbelief.workers.lease import LeaseQueue
from distbelief.workers.notes import Halt, Next, Serving, Stepped, Where, Who, Work

RUN, TOKEN = "job", "secret"
LEASE = 20


class Office:
    """A standby and its process, followed by a thread as the launcher's loop would."""

    def __init__(self, folder, *, samples=100, epochs=1, workers=1, restarts=3, port=0):
        queue = LeaseQueue(samples, LEASE, epochs)
        self.controller = Controller(RUN, TOKEN, queue, 1, epochs, num_workers=workers)
        self.said: list[str] = []
        net = NetConfig(port=port)
        self.standby = Standby(self.controller, net, None, folder, restarts, self.said.append)
        self.standby.start()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lines: list[Control] = []

    @property
    def pid(self) -> int:
        return self.controller.members[CONTROLLER].pid

    def line(self) -> Control:
        """A process's line to the controller."""
        line = Control(ZmqClient(self._context), self.standby.endpoint)
        self._lines.append(line)
        return line

    def ask(self, line, kind, name="w0", inc=1, **fields):
        """Ask while the standby is followed."""
        answers = []
        note = kind(run=RUN, token=TOKEN, name=name, inc=inc, **fields)
        thread = threading.Thread(target=lambda: answers.append(line.ask(note)))
        thread.start()
        while thread.is_alive():
            self.standby.follow(0.01)
        return answers[0]

    def serve_shard(self, line):
        self.ask(line, Serving, "shard0", endpoint="tcp://here:1", pid=1, host="h")

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def follow_until(self, condition, timeout_s=20.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            self.standby.follow(0.01)

    def close(self):
        for line in self._lines:
            line.close()
        self.standby.close()
        self._context.term()


@pytest.fixture
def office(tmp_path):
    offices = []

    def make(**more):
        offices.append(Office(tmp_path, **more))
        return offices[-1]

    yield make
    for one in offices:
        one.close()


def step(line: Control, answered: int, name: str = "w0") -> None:
    """A worker tells that so many of its samples were answered, in all."""
    who: Who = {"run": RUN, "token": TOKEN, "name": name, "inc": 1}
    line.tell(
        Stepped(
            **who,
            answered=answered,
            samples=LEASE,
            loss=1.0,
            pushed=False,
            staleness=0,
            version=0,
            refused=0,
            reason="",
        )
    )


def test_what_was_handed_out_is_known_after_a_kill(office):
    one = office()
    shard, worker = one.line(), one.line()
    one.serve_shard(shard)
    one.ask(worker, Where, pid=1, host="h")
    assert one.ask(worker, Next, taken=0) == Work(epoch=0, start=0, stop=20)
    step(worker, 20)
    one.follow_until(lambda: one.controller.queue.done_samples == 20)
    before = one.pid
    one.kill()
    assert one.ask(worker, Next, taken=0) == Work(epoch=0, start=0, stop=20)  # as if it was lost
    assert one.pid != before
    assert one.ask(worker, Next, taken=1) == Work(epoch=0, start=20, stop=40)
    assert one.controller.worker_samples == {"w0": 20}
    assert one.controller.queue.handed_out == 40
    assert one.controller.endpoints == {0: "tcp://here:1"}
    assert one.standby.num_restarts == 1
    assert one.said == [
        "the controller is lost (killed by signal 9): it is started again where it was"
    ]


def test_orders_are_carried_out_once_whoever_is_killed_meanwhile(office):
    one = office(restarts=100)
    shard, worker = one.line(), one.line()
    one.serve_shard(shard)
    one.ask(worker, Where, pid=1, host="h")
    one.ask(worker, Next, taken=0)
    for number in range(10):
        one.kill()
        assert one.standby.do(Lose(f"w{10 + number}")) == 0
        one.ask(worker, Next, taken=0)  # it has done what it is there for
    assert one.controller.lost == [f"w{10 + number}" for number in range(10)]
    assert one.standby.do(Lose("w0")) == 20
    one.standby.do(Admit("w0"))


def test_no_lease_is_handed_out_twice_while_the_controller_is_killed_again_and_again(office):
    names = [f"w{index}" for index in range(4)]
    one = office(samples=LEASE * 1500, workers=len(names), restarts=100)
    one.serve_shard(one.line())
    got: dict[str, list[Work]] = {name: [] for name in names}

    def work(name, line):
        who = {"run": RUN, "token": TOKEN, "name": name, "inc": 1}
        line.ask(Where(**who, pid=1, host="h"))
        while True:
            answer = line.ask(Next(**who, taken=len(got[name])))
            if isinstance(answer, Halt):
                return
            if isinstance(answer, Work):
                got[name].append(answer)
                step(line, LEASE * len(got[name]), name)
            time.sleep(0.002)

    threads = [threading.Thread(target=work, args=(name, one.line())) for name in names]
    for thread in threads:
        thread.start()
    num_kills, serves_since = 0, time.monotonic()
    deadline = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads):
        now = time.monotonic()
        assert now < deadline
        one.standby.follow(0.01)
        if not one.standby.is_serving:
            serves_since = now
        elif now - serves_since > 0.1 + 0.03 * (num_kills % 7):
            one.kill()
            num_kills += 1
            one.follow_until(lambda: not one.standby.is_serving)
    for thread in threads:
        thread.join()
    leases = [(work.epoch, work.start, work.stop) for works in got.values() for work in works]
    assert sorted(leases) == [(0, i * LEASE, (i + 1) * LEASE) for i in range(1500)]
    assert num_kills > 2
    queue = one.controller.queue
    assert (queue.handed_out, queue.returned_samples) == (LEASE * 1500, 0)
    # Notes without an answer may be lost with the process; the next one of the same worker heals.
    for name, line in zip(names, one._lines[1:], strict=True):
        step(line, LEASE * len(got[name]), name)
    one.follow_until(lambda: queue.done_samples == LEASE * 1500)
    assert one.controller.adds_up


def test_a_frozen_controller_is_replaced_and_nobody_else_is_thought_silent(office, monkeypatch):
    monkeypatch.setattr(standby_module, "SILENCE_S", 1.5)
    one = office()
    shard = one.line()
    one.serve_shard(shard)
    before = one.pid
    one.kill(signal.SIGSTOP)
    time.sleep(0.3)
    frozen_at = time.monotonic()
    one.follow_until(lambda: not one.standby.is_current)
    one.follow_until(lambda: one.pid != before)
    assert "it has said nothing for 2 s" in one.said[0]
    one.follow_until(lambda: one.standby.is_current)
    heard = one.controller.heard("shard0")
    assert heard is not None
    assert heard > frozen_at
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_one_that_was_paused_for_a_while_goes_on(office):
    one = office()
    worker = one.line()
    one.serve_shard(one.line())
    before = one.pid
    one.kill(signal.SIGSTOP)
    time.sleep(1.5)
    one.kill(signal.SIGCONT)
    one.ask(worker, Where, pid=1, host="h")
    assert one.pid == before
    assert one.standby.num_restarts == 0


def test_one_that_is_lost_at_once_each_time_ends_the_run_with_the_first_cause(office, monkeypatch):
    one = office(restarts=2)
    monkeypatch.setattr("distbelief.supervisor.BACK_OFF_S", 0.05)
    one.kill(signal.SIGSEGV)
    for _ in range(2):
        before = one.pid
        one.follow_until(lambda pid=before: one.pid != pid)
        one.kill()
    with pytest.raises(Problem) as caught:
        one.follow_until(lambda: False)
    assert caught.value.code == "DB-RUN-016"
    assert caught.value.what == "the controller is lost (killed by signal 11)"
    assert "lost 3 times" in caught.value.why


def test_a_port_that_somebody_has_is_told_before_anything_is_started(office):
    one = office()
    port = int(one.standby.endpoint.rpartition(":")[2])
    with pytest.raises(Problem) as caught:
        office(port=port)
    assert caught.value.code == "DB-ENV-005"


def test_it_ends_with_the_launcher(office):
    one = office()
    pid = one.pid
    assert one.standby._process is not None
    assert one.standby._process.stdin is not None
    one.standby._process.stdin.close()
    assert one.standby._process.wait(10) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_copy_and_process_are_the_same(office, monkeypatch):
    """What a process is given to begin with is the copy, all of it."""
    one = office()
    worker = one.line()
    one.serve_shard(one.line())
    one.ask(worker, Where, pid=1, host="h")
    one.ask(worker, Next, taken=0)
    copy = asdict(one.controller)
    monkeypatch.setattr(Controller, "tick", lambda *_: None)
    one.kill()
    one.follow_until(lambda: one.standby.num_restarts == 1 and one.standby.is_serving)
    after = asdict(one.controller)
    changed = {key for key in copy if copy[key] != after[key]}
    assert changed <= {"members", "ticked_at", "_heard"}
