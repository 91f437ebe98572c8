"""What the monitor is told of a run, from the controller's copy and the staff."""

from dataclasses import dataclass, field

import pytest

from distbelief.chronicle import Event, RunReport, decode, encode
from distbelief.chronicler import CHECKPOINT_S, EVERY_S, TEXT_MAX, Chronicler
from distbelief.controller.machine import CONTROLLER, Member
from distbelief.workers.notes import Ended, Leaving, Serving, Where
from tests.app.test_controller import Play

WALL = 1.8e9


@dataclass
class Crew:
    """The staff, as far as it is asked."""

    workers: list[str] = field(default_factory=lambda: ["w0", "w1"])
    shards: list[str] = field(default_factory=lambda: ["shard0"])
    lost: dict[str, int] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)

    def num_lost(self, name: str) -> int:
        return self.lost.get(name, 0)

    def is_given_up(self, name: str) -> bool:
        return name in self.given_up


class Desk:
    """A controller, its chronicler, and what that tells."""

    def __init__(self) -> None:
        self.play, self.crew = Play(), Crew()
        self.chronicler = Chronicler(self.play.controller, self.crew)
        self.checkpoint: dict[str, object] | None = None
        self.state = "training"

    def look(self, after_s: float = EVERY_S) -> list[Event | RunReport]:
        self.play.now += after_s
        told = self.chronicler.look(
            self.play.now, WALL + self.play.now, self.state, self.checkpoint, 0, 0
        )
        for entry in told:
            assert decode(encode(entry)) == entry
        return [entry for entry in told if isinstance(entry, Event | RunReport)]

    def events(self, after_s: float = EVERY_S) -> list[tuple[str, str]]:
        return [(e.kind, e.who) for e in self.look(after_s) if isinstance(e, Event)]

    def report(self) -> RunReport:
        (report,) = [entry for entry in self.look() if isinstance(entry, RunReport)]
        return report


@pytest.fixture
def desk():
    return Desk()


def test_the_run_is_told_once_a_second_and_at_once_when_its_state_changes(desk):
    assert [type(e) for e in desk.look(0.0)] == [Event, RunReport]  # the first state
    assert desk.look(EVERY_S / 2) == []
    assert [type(e) for e in desk.look(EVERY_S / 2)] == [RunReport]
    desk.state = "saving"
    event, report = desk.look(0.0)
    assert (event.kind, event.text, report.state) == ("state", "the run is saving", "saving")
    assert desk.look(0.0) == []


def test_the_report_has_what_controller_and_staff_know(desk):
    desk.play.where("w0")
    desk.play.next("w0")
    desk.play.step("w0", answered=5, samples=5, loss=2.0, pushed=True, version=3)
    desk.crew.lost["shard0"] = 2
    report = desk.report()
    assert (report.samples, report.total_samples, report.updates) == (5, 100, 3)
    assert (report.loss, report.epoch) == (2.0, 0.05)
    w0, w1 = report.workers
    assert (w0.name, w0.inc, w0.pid, w0.host, w0.state, w0.samples) == (
        "w0", 1, 20, "h", "training", 5,
    )  # fmt: skip
    assert (w1.name, w1.inc, w1.state) == ("w1", 0, "starting")
    (shard,) = report.shards
    assert (shard.pid, shard.state, shard.restarts) == (10, "serving", 2)
    assert (report.accounting["handed_out"], report.accounting["in_flight"]) == (20, 15)


def test_workers_are_in_the_order_of_their_numbers(desk):
    desk.crew.workers = ["w10", "w2", "w0"]
    assert [worker.name for worker in desk.report().workers] == ["w0", "w2", "w10"]


def test_who_comes_has_joined_and_who_was_lost_is_back_after_so_long(desk):
    desk.look()
    desk.play.where("w0")
    assert desk.events() == [("join", "w0")]
    desk.chronicler.notice("crash", "w0", "w0 is lost: killed by signal 9")
    desk.play.controller.lose("w0")
    (crash,) = [e for e in desk.look(0.25) if isinstance(e, Event)]  # at once, not in a second
    assert (crash.kind, crash.text, crash.node) == ("crash", "w0 is lost: killed by signal 9", "h")
    desk.play.say(Where, "w0", inc=2, pid=21, host="h")
    (back,) = [e for e in desk.look(2.0) if isinstance(e, Event)]
    assert (back.kind, back.who, back.text) == ("recover", "w0", "w0 is back after 2.0 s")
    assert desk.events() == []


def test_who_is_lost_before_it_was_seen_had_joined_and_is_not_back_yet(desk):
    desk.look()
    desk.play.where("w0")
    desk.chronicler.notice("crash", "w0", "w0 is lost: killed by signal 9")
    desk.play.controller.lose("w0")
    assert desk.events() == [("join", "w0"), ("crash", "w0")]
    assert desk.events(3.0) == []
    desk.play.say(Where, "w0", inc=2, pid=21, host="h")
    (back,) = [e for e in desk.look() if isinstance(e, Event)]
    assert (back.kind, back.text) == ("recover", "w0 is back after 4.0 s")


def test_a_controller_that_is_lost_is_back_and_its_restarts_are_counted(desk):
    desk.look()
    desk.play.controller.members[CONTROLLER] = Member(CONTROLLER, 1, 30, "h")
    assert desk.events() == []  # it has not joined: it is not part of the crew
    desk.chronicler.notice("crash", CONTROLLER, "the controller is lost")
    assert desk.events(0.1) == [("crash", CONTROLLER)]
    desk.play.controller.members[CONTROLLER] = Member(CONTROLLER, 2, 31, "h")
    assert desk.events(2.0) == [("recover", CONTROLLER)]
    told = desk.chronicler.look(desk.play.now + 1, WALL, "training", None, 3, 7)
    (report,) = [entry for entry in told if isinstance(entry, RunReport)]
    assert (report.controller_restarts, report.dropped) == (3, 7)


def test_a_shard_that_serves_is_no_news_but_one_that_is_back_is(desk):
    assert ("join", "shard0") not in desk.events()
    desk.chronicler.notice("crash", "shard0", "shard0 is lost")
    desk.play.controller.lose_shard("shard0")
    assert desk.events(0.0) == [("crash", "shard0")]
    report = desk.report()
    assert report.shards[0].state == "lost"
    desk.play.say(Serving, "shard0", inc=2, endpoint="tcp://here:0", pid=11, host="h")
    assert desk.events() == [("recover", "shard0")]


def test_a_checkpoint_is_told_when_it_is_another_one_and_the_last_a_minute_old(desk):
    desk.look()
    desk.checkpoint = {"samples": 1500, "shards": ["a", "b"]}
    (event, _) = desk.look()
    assert (event.kind, event.text) == ("checkpoint", "checkpoint of 1,500 samples, 2 shards")
    assert desk.events() == []
    desk.checkpoint = {"samples": 1600, "shards": ["a", "c"]}
    assert desk.events() == []
    assert desk.events(CHECKPOINT_S) == [("checkpoint", "")]


def test_storage_that_fails_and_works_again(desk):
    desk.look()
    desk.play.controller.storage_errors["shard0"] = "no space left"
    event, report = desk.look()
    assert (event.kind, event.text) == ("storage", "shard0 cannot save: no space left")
    assert report.shards[0].storage_error == "no space left"
    assert desk.events() == []
    del desk.play.controller.storage_errors["shard0"]
    (event, _) = desk.look()
    assert (event.kind, event.text) == ("storage", "shard0 saves again")


def test_a_worker_in_quarantine_is_told_once(desk):
    desk.look()
    desk.play.controller.quarantined["w1"] = "refused again and again"
    assert desk.events() == [("quarantine", "w1")]
    assert desk.events() == []


def test_states_of_workers_are_the_page_s_words(desk):
    for name in ("w0", "w1"):
        desk.play.where(name)
    desk.play.controller.drain("w0")
    assert [w.state for w in desk.report().workers] == ["draining", "training"]
    desk.play.say(Leaving, "w0")
    desk.play.say(Ended, "w0", code="", text="", is_drained=True)
    assert desk.report().workers[0].state == "left"
    desk.play.controller.lose("w1")
    assert desk.report().workers[1].state == "lost"
    desk.crew.given_up.add("w1")
    assert desk.report().workers[1].state == "given-up"


def test_what_others_say_is_bounded_and_can_be_sent(desk):
    desk.chronicler.notice("crash", "w0", "\ud800" + "x" * 10_000)
    event = desk.look()[0]
    assert isinstance(event, Event)
    assert len(event.text) == TEXT_MAX
