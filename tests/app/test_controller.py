"""The controller: notes in, answers out; it knows who takes part and who trains on what."""

from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest

from distbelief.controller.account import Tally
from distbelief.controller.machine import ELASTIC_GATHER_S, GATHER_S, STALL_S, Controller
from distbelief.controller.pace import Pace
from distbelief.controller.saves import POSITIONS_MAX
from distbelief.workers.lease import LeaseQueue, Position
from distbelief.workers.notes import (
    QUARANTINED,
    Bad,
    Beat,
    Denied,
    Drain,
    Ended,
    Fence,
    Fenced,
    Find,
    Halt,
    Leaving,
    Next,
    Noted,
    Over,
    Serving,
    Shards,
    Stepped,
    Wait,
    Where,
    Work,
)


class Play:
    """A controller of 100 samples in leases of 20, and whoever talks to it."""

    def __init__(self, num_shards: int = 1, num_epochs: int | None = 1, serve: bool = True, **end):
        self.queue = LeaseQueue(100, 20, num_epochs)
        self.controller = Controller("job", "secret", self.queue, num_shards, num_epochs, **end)
        self.now = 0.0
        self.taken: Counter[tuple[str, int]] = Counter()
        for index in range(num_shards if serve else 0):
            self.serve(index)

    def say(self, kind, name="w0", inc=1, token="secret", run="job", **fields):
        note = kind(run=run, token=token, name=name, inc=inc, **fields)
        return self.controller.handle(note, self.now)

    def serve(self, index: int):
        endpoint = f"tcp://here:{index}"
        return self.say(Serving, f"shard{index}", endpoint=endpoint, pid=10 + index, host="h")

    def where(self, name="w0"):
        return self.say(Where, name, pid=20, host="h")

    def next(self, name="w0", inc=1, is_lost=False):
        """Ask for a lease; with is_lost the answer does not arrive."""
        answer = self.say(Next, name, inc, taken=self.taken[name, inc])
        self.taken[name, inc] += isinstance(answer, Work) and not is_lost
        return answer

    def step(self, name="w0", answered=0, samples=0, loss=1.0, **more):
        fields = {"pushed": False, "staleness": 0, "version": 0, "refused": 0, "reason": "", **more}
        return self.say(Stepped, name, answered=answered, samples=samples, loss=loss, **fields)

    def push(self, version, name="w0", **more):
        return self.step(name, pushed=True, version=version, **more)

    def fence(self, *rows, shard="shard0", inc=1):
        """A shard beats, and does what it is told; rows: what its parts have of the worker."""
        answer = self.say(Beat, shard, inc)
        while isinstance(answer, Fence):
            fields = asdict(Tally.of(rows or [(0, 0)]))
            answer = self.say(Fenced, shard, inc, w=answer.w, of_inc=answer.inc, **fields)
        return answer

    def end(self, name="w0", code="", text=""):
        return self.say(Ended, name, code=code, text=text)


def test_workers_wait_until_all_shards_serve():
    play = Play(num_shards=2, serve=False)
    assert play.where() == Wait()
    assert play.serve(1) == Noted()
    assert play.where() == Wait()
    play.serve(0)
    assert play.where() == Shards(endpoints=("tcp://here:0", "tcp://here:1"), initialise=True)


def test_one_worker_brings_the_first_parameters():
    play = Play()
    assert play.where("w1").initialise
    assert play.where("w0") == Wait()
    assert play.where("w1").initialise  # it asks again where the answer was lost
    play.next("w1")
    assert not play.where("w0").initialise


def test_a_worker_lost_before_the_beginning_is_replaced_as_initialiser():
    play = Play()
    assert play.where("w0").initialise
    assert play.where("w1") == Wait()
    play.controller.lose("w0")
    assert play.where("w1").initialise


def test_a_worker_lost_after_the_beginning_leaves_the_parameters_where_they_are():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.controller.lose("w0")
    assert not play.where("w1").initialise


def test_work_is_handed_out_until_the_epochs_are_done():
    play = Play()
    assert [play.next() for _ in range(5)] == [
        Work(epoch=0, start=s, stop=s + 20) for s in range(0, 100, 20)
    ]
    assert play.next() == Wait()  # its own work may still come back
    play.step(answered=100)
    assert play.next() == Halt()
    assert play.controller.progress(1.0).samples == 100


def test_a_question_asked_again_gets_the_same_lease():
    play = Play()
    play.where()
    lost = play.next(is_lost=True)
    assert play.next() == lost
    assert play.next() != lost
    play.step(answered=40)
    assert play.controller.progress(0.0).samples == 40


def test_a_lost_note_of_answered_samples_is_made_up_by_the_next_one():
    play = Play()
    play.where()
    play.next()
    # answered=5 was lost on the way
    play.step(answered=12)
    play.step(answered=12)
    assert play.controller.progress(0.0).samples == 12


def test_a_worker_that_says_nothing_for_too_long_is_silent():
    play = Play()
    play.where("w0")
    play.now = 200.0
    play.where("w1")
    assert play.controller.silent(300.0, patience_s=300.0) == []
    assert play.controller.silent(301.0, patience_s=300.0) == ["w0"]
    play.controller.lose("w0")
    assert play.controller.silent(301.0, patience_s=300.0) == []


def test_the_work_of_a_lost_worker_goes_to_the_others():
    play = Play()
    for name in ("w0", "w1"):
        play.where(name)
        play.next(name)
    play.step("w1", answered=5)
    assert play.controller.lose("w1") == 15
    assert play.controller.lost == ["w1"]
    assert play.controller.is_settling
    assert play.fence((5, 0), (5, 0)) == Noted()
    assert play.next("w0") == Work(epoch=0, start=25, stop=40)
    assert play.controller.progress(0.0).num_workers == 1


def test_nothing_is_handed_to_the_dead():
    """A note of a killed worker may still be on its way when its death is noticed."""
    play = Play()
    play.where("w0")
    play.next("w0")
    play.controller.lose("w0")
    assert play.next("w0") == Halt()
    assert play.step("w0", answered=20) is None
    assert play.where("w0") == Halt()
    assert play.queue.done_samples == 0
    play.fence()
    play.where("w1")
    assert play.next("w1") == Work(epoch=0, start=0, stop=20)
    assert play.controller.progress(0.0).num_workers == 1


def test_a_new_incarnation_of_a_lost_worker_is_welcome():
    play = Play()
    play.where("w0")
    play.controller.lose("w0")
    assert play.next("w0", inc=2) == Work(epoch=0, start=0, stop=20)


def test_a_worker_that_ends_gives_its_work_back():
    play = Play()
    play.where()
    play.next()
    assert play.end() == Noted()
    assert play.controller.ended == {"w0": ("", "")}
    assert play.controller.first_error is None
    play.fence()
    assert play.next("w1") == Work(epoch=0, start=0, stop=20)


def test_the_first_error_is_the_first():
    play = Play()
    play.end("w2")
    play.end("w1", "DB-TRAIN-001", "nan")
    play.end("w0", "DB-RUN-001", "a consequence")
    assert play.controller.first_error == ("w1", "DB-TRAIN-001", "nan")


@pytest.mark.parametrize("wrong", [{"token": "guess"}, {"run": "other"}, {"token": "sécret"}])
def test_a_stranger_is_counted_and_told_to_halt(wrong):
    play = Play()
    assert play.say(Next, taken=0, **wrong) == Halt()
    assert play.say(Where, pid=1, host="h", **wrong) == Halt()
    assert play.controller.num_strangers == 2
    assert play.controller.pace.began_at is None
    assert "w0" not in play.controller.members


def test_a_process_is_who_its_key_says():
    play = Play(serve=False)
    find = Find(run="job", token="secret", name="w1", inc=1)
    for speaker in ("w0", "shard0", ""):
        assert play.controller.handle(find, 0.0, speaker) == Halt()
    assert play.controller.num_strangers == 3
    assert play.controller.handle(find, 0.0, "w1") == Wait()
    assert play.controller.num_strangers == 3


@pytest.mark.parametrize("name", ["w0", "shard1", "shard7", "shard00", "launcher"])
def test_nobody_serves_but_a_shard_of_the_run(name):
    play = Play(serve=False)
    assert play.say(Serving, name, endpoint="tcp://there:1", pid=1, host="h") == Halt()
    assert play.controller.endpoints == {}
    assert play.controller.num_strangers == 1


def test_a_shard_gets_no_work():
    play = Play()
    assert play.where("shard0") == play.next("shard0") == Halt()
    assert play.controller.num_strangers == 2


def test_until_updates_stops_the_work_and_lets_what_is_begun_end():
    play = Play(num_epochs=None, num_updates=10)
    play.next()
    play.push(9)
    assert isinstance(play.next(), Work)
    play.push(10)
    assert play.queue.is_stopped
    assert play.next() == Halt()  # what it holds it finishes first; nothing new comes
    play.step(answered=40)
    assert play.next() == Halt()


def test_a_time_limit_counts_from_the_first_work():
    play = Play(num_epochs=None, limit_s=60.0)
    play.controller.tick(1000.0)
    play.now = 1000.0
    assert isinstance(play.next(), Work)
    play.controller.tick(1059.9)
    assert isinstance(play.next(), Work)
    assert play.controller.progress(1020.0).eta_s == 40
    play.controller.tick(1060.0)
    assert play.queue.is_stopped
    assert play.controller.progress(1070.0).eta_s == 0


def test_shards_are_told_when_they_are_not_wanted_any_more():
    play = Play()
    assert play.say(Beat, "shard0", storage_error="") == Noted()
    play.controller.is_halting_shards = True
    assert play.say(Beat, "shard0", storage_error="") == Halt()


def test_a_storage_error_is_known_until_a_snapshot_succeeds():
    play = Play()
    play.say(Beat, "shard0", storage_error="disk full")
    assert play.controller.storage_errors == {"shard0": "disk full"}
    play.say(Beat, "shard0", storage_error="")
    assert play.controller.storage_errors == {}


def test_progress_tells_how_far_the_run_is():
    play = Play(num_epochs=2)
    play.where()
    play.now = 10.0
    play.next()
    for second in (11.0, 12.0):
        play.now = second
        play.push(int(second), answered=10 * int(second - 10), samples=10, loss=2.0, staleness=3)
    progress = play.controller.progress(14.0)
    assert (progress.samples, progress.total_samples, progress.updates) == (20, 200, 12)
    assert (progress.loss, progress.num_workers, progress.refused) == (2.0, 1, 0)
    assert progress.samples_per_s == 5.0  # 20 in the 4 seconds since it began
    assert progress.eta_s == 36.0
    assert progress.staleness.maximum == 3
    assert play.controller.pace.train_s == 2.0
    assert play.controller.progress(100.0).samples_per_s == 0


def test_before_anything_has_happened_progress_is_empty():
    progress = Play().controller.progress(5.0)
    assert (progress.samples, progress.updates, progress.loss) == (0, 0, None)
    assert (progress.samples_per_s, progress.eta_s) == (0.0, None)
    assert Play().controller.pace.train_s == 0.0


def test_steps_are_forgotten_where_nobody_reads_the_rate():
    """As in the controller's process: its launcher's copy is what is looked at."""
    pace = Pace()
    for now in range(1000):
        pace.step(1, 1.0, 10, float(now))
    assert len(pace._times) <= 6
    assert pace.rate(999.0) == pytest.approx(6 / 5)


def test_eta_of_a_number_of_updates_follows_their_pace():
    play = Play(num_epochs=None, num_updates=100)
    play.next()
    play.now = 10.0
    play.push(25)
    assert play.controller.progress(10.0).eta_s == 30.0


def test_the_loss_is_the_mean_of_the_newest_epoch():
    play = Play(num_epochs=5)
    for loss in (9.0, 9.0, 1.0, 2.0):
        for _ in range(5):
            play.step(samples=10, loss=loss)
    assert play.controller.pace.mean_loss == 1.5
    play.step(samples=0, loss=0.0)  # a note that tells of answers only
    assert play.controller.pace.mean_loss == 1.5


def test_a_loss_weighs_by_its_samples():
    play = Play()
    play.step(samples=30, loss=1.0)
    play.step(samples=10, loss=5.0)
    assert play.controller.pace.mean_loss == 2.0


def test_refused_parts_are_counted_with_the_last_reason():
    play = Play()
    play.push(1, refused=2, reason="nan")
    play.push(2)
    play.push(3, refused=1, reason="damaged")
    assert (play.controller.refused, play.controller.refused_reason) == (3, "damaged")


def test_processes_are_listed_with_pid_and_host():
    play = Play()
    play.where()
    assert play.controller.processes() == [
        {"name": "shard0", "inc": 1, "pid": 10, "host": "h"},
        {"name": "w0", "inc": 1, "pid": 20, "host": "h"},
    ]


# Start


def test_nobody_begins_before_all_have_reported():
    play = Play(num_workers=2)
    assert play.where("w0") == Wait()
    assert play.where("w1").initialise  # whoever asks first when all are there
    assert play.where("w0") == Wait()


def test_a_worker_that_never_comes_is_waited_for_a_minute():
    play = Play(num_workers=3)
    play.where("w0")
    play.now = GATHER_S - 1
    assert play.where("w1") == Wait()
    play.now = GATHER_S
    assert play.where("w0").initialise


def test_one_that_has_ended_counts_as_reported():
    play = Play(num_workers=2)
    play.where("w1")
    play.end("w1")
    assert play.where("w0").initialise


def test_no_work_is_handed_out_before_all_have_their_parameters():
    play = Play(num_workers=2)
    play.where("w0")
    play.where("w1")
    assert play.next("w1") == Wait()
    assert play.controller.pace.began_at is None
    assert not play.where("w0").initialise
    play.step("w0")  # tells that it has its parameters
    assert play.next("w1") == Work(epoch=0, start=0, stop=20)


def test_a_late_one_is_not_waited_for_once_they_have_started():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.where("w1")
    assert isinstance(play.next("w0"), Work)


def test_one_whose_parameters_do_not_come_is_waited_for_a_minute():
    play = Play(num_workers=2)
    play.where("w0")
    play.where("w1")
    assert play.next("w1") == Wait()
    play.now = GATHER_S
    assert isinstance(play.next("w1"), Work)


# Data


def test_a_worker_that_sees_other_data_ends_the_run():
    play = Play(digest="abc")
    answer = play.say(Where, pid=20, host="h", num_samples=99, digest="abd")
    assert answer == Halt()
    assert play.controller.first_error == (
        "w0",
        "DB-DATA-002",
        "w0 on h sees other data than the launcher: 99 samples, the launcher 100",
    )
    play.say(Where, "w1", pid=20, host="i", num_samples=100, digest="xyz")
    error = play.controller.first_error
    assert error is not None
    assert error[0] == "w0"


def test_data_of_the_same_length_may_be_other_data():
    play = Play(digest="abc")
    play.say(Where, pid=20, host="h", num_samples=100, digest="abd")
    error = play.controller.first_error
    assert error is not None
    assert error[2].endswith("the launcher 100, of other names or sizes")


def test_samples_that_cannot_be_read_end_the_run_above_the_limit():
    play = Play(bad_max=2)
    assert play.say(Bad, samples=("a", "b"), reasons=("cut", "empty")) is None
    play.say(Bad, "w1", samples=("a",), reasons=("cut",))  # the same, seen by another
    assert play.controller.first_error is None
    play.say(Bad, "w1", samples=("c",), reasons=("cut",))
    assert play.controller.first_error == (
        "w1",
        "DB-DATA-003",
        "3 of 100 samples cannot be read, more than the 2 that data.max_bad allows; the first is "
        "a: cut",
    )


# Scripts


class ScriptPlay(Play):
    """A controller that learns the data's length from workers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.queue = LeaseQueue(0, 0)
        self.controller.queue = self.queue

    def ask(self, upto, name="w0", *, num_samples=40, is_first=False, kept=0):
        answer = self.say(
            Next,
            name,
            taken=self.taken[name, 1],
            upto=upto,
            num_samples=num_samples,
            batch_size=5,
            is_first=is_first,
            kept=kept,
        )
        self.taken[name, 1] += isinstance(answer, Work)
        return answer


def test_an_epoch_of_a_script_is_over_when_it_has_been_handed_out():
    play = ScriptPlay()
    play.where("w0")
    assert play.ask(0, is_first=True) == Work(epoch=0, start=0, stop=20)
    assert play.ask(0) == Work(epoch=0, start=20, stop=40)
    assert play.ask(0) == Over()
    assert play.ask(1, "w1") == Work(epoch=1, start=0, stop=20)


def test_a_new_iteration_gives_back_what_was_left_but_for_what_is_kept():
    play = ScriptPlay()
    play.where("w0")
    play.ask(0, is_first=True)
    play.ask(0)
    play.step(answered=10)
    assert play.ask(1, is_first=True, kept=5) == Work(epoch=0, start=15, stop=20)
    play.step(answered=15)
    assert play.queue.done_samples == 15
    play.step(answered=20)
    assert play.controller.lose("w0") == 0


def test_other_lengths_are_denied_and_the_run_goes_on():
    play = ScriptPlay()
    play.where("w0")
    play.ask(0)
    assert play.ask(0, "w1", num_samples=41) == Denied(
        text="w1: the data has 41 samples here, 40 there"
    )
    assert play.controller.first_error is None
    assert isinstance(play.ask(0), Work)


def test_a_script_that_only_looks_at_data_has_brought_no_parameters():
    play = ScriptPlay(num_workers=2)
    assert isinstance(play.ask(0, is_first=True), Work)
    assert (play.controller.is_initialised, play.controller.pace.began_at) == (False, None)
    play.where("w0")
    assert play.where("w1").initialise
    assert play.ask(0, "w0", is_first=True) == Wait()  # the other has no parameters yet


def test_a_stopped_queue_halts_a_script_between_two_steps():
    play = ScriptPlay()
    play.where("w0")
    play.ask(0)
    assert play.say(Beat) == Noted()
    play.queue.stop()
    assert play.say(Beat) == Halt()
    assert play.ask(0) == Halt()


def test_skipped_samples_are_done_but_not_trained_on():
    play = ScriptPlay()
    play.where("w0")
    play.ask(0)
    play.step(answered=10, skipped=5)
    assert play.queue.done_samples == 15
    assert play.controller.worker_samples == {"w0": 10}
    assert play.controller.skipped_samples == 5


def test_a_note_that_was_overtaken_changes_nothing():
    """An older one over a link that was given up may be read after a newer one."""
    play = Play()
    play.where()
    for _ in range(3):
        play.next()
    for answered in (20, 12, 20, 30):
        play.step(answered=answered, skipped=answered // 10)
    assert play.controller.worker_samples == {"w0": 30}
    assert play.queue.done_samples == 33
    assert play.controller.skipped_samples == 3


def test_a_loss_that_is_not_known_is_not_in_the_mean():
    play = Play()
    play.step(samples=10, loss=3.0)
    play.step(samples=10, loss=0.0, knows_loss=False)
    assert play.controller.pace.mean_loss == 3.0


# Checkpoints


class Saving(Play):
    """Shards that save, and a worker that trains 10 samples each second from 0 on."""

    def __init__(self, num_shards=1, **options):
        super().__init__(num_shards, num_epochs=None, **options)
        self.where()

    def train(self, seconds: int):
        for _ in range(seconds):
            self.now += 1
            done = self.queue.done_samples + 10
            while self.queue.unfinished_samples < 10:
                self.next()
            self.step(answered=done, samples=10)
            self.controller.tick(self.now)

    def saved(self, shard=0, age_s=0.0, name="e1-v5", **fields):
        fields = {"version": 5, "samples": 50, **fields}
        return self.say(Beat, f"shard{shard}", saved=name, age_s=age_s, **fields)

    @property
    def position(self):
        checkpoint: Any = self.controller.checkpoint()
        return None if checkpoint is None else checkpoint["position"]["done_samples"]


def test_there_is_no_checkpoint_before_all_shards_have_saved():
    play = Saving(num_shards=2)
    play.train(5)
    play.saved(0)
    assert play.controller.checkpoint() is None
    play.saved(1, version=4, samples=41)
    checkpoint: Any = play.controller.checkpoint()
    assert (checkpoint["samples"], checkpoint["updates"]) == (41, 4)
    assert checkpoint["shards"]["shard1"] == {
        "name": "e1-v5",
        "epoch": 1,
        "version": 4,
        "samples": 41,
    }
    assert Position.from_dict(checkpoint["position"]).num_samples == 100


@pytest.mark.parametrize(("ages", "done"), [((0, 0), 100), ((4, 0), 60), ((0, 7.5), 20)])
def test_the_position_is_not_after_the_oldest_snapshot(ages, done):
    play = Saving(num_shards=2)
    play.train(10)
    for shard, age_s in enumerate(ages):
        play.saved(shard, age_s)
    assert play.position == done


def test_a_snapshot_from_before_the_start_has_the_first_position():
    play = Saving()
    play.train(3)
    play.saved(0, age_s=1000.0)
    assert play.position == 0


def test_a_beat_that_was_long_on_its_way_does_not_move_the_position_forward():
    play = Saving()
    play.train(10)
    play.saved(age_s=4.5)  # taken at 5.5
    assert play.position == 50
    play.now += 0.9
    play.saved(age_s=4.5)  # the same snapshot, taken at 6.4 as this note would have it
    assert play.position == 50


def test_the_same_snapshot_saved_again_is_of_a_later_moment():
    """As the last one, after a run in which nothing was pushed since the one before."""
    play = Saving()
    play.train(10)
    play.saved(age_s=5.0)
    assert play.position == 50
    play.controller.halt_shards(play.now)
    play.saved(age_s=0.0)
    assert play.position == 100


def test_after_the_last_worker_has_ended_the_position_is_exact():
    play = Saving()
    play.train(3)
    play.now += 0.5
    play.step(answered=40)  # there was no tick since
    play.controller.halt_shards(play.now)
    play.now += 0.1
    play.saved()
    assert play.position == 40


@pytest.mark.parametrize("age_s", [0, 100, 3000, 3990, 5000])
def test_a_shard_that_has_not_saved_for_hours_finds_a_position_before_its_snapshot(age_s):
    play = Saving()
    play.train(4000)
    assert len(play.controller.saves._positions) <= POSITIONS_MAX
    play.saved(age_s=float(age_s))
    trained = max(0, 10 * (4000 - age_s))
    assert play.position <= trained
    assert play.position >= trained - 10 * max(1, age_s)


def test_workers_are_told_apart_by_what_became_of_them():
    play = Play()
    for name in ("w10", "w2", "w0"):
        play.where(name)
    play.next("w2")
    play.step("w2", answered=7)
    play.controller.lose("w0")
    play.end("w10")
    assert list(play.controller.workers().items()) == [
        ("w0", {"state": "lost", "samples": 0}),
        ("w2", {"state": "training", "samples": 7}),
        ("w10", {"state": "ended", "samples": 0}),
    ]


def test_why_and_what_to_do_are_kept_of_what_ended():
    play = Play()
    play.say(Ended, code="DB-SCRIPT-001", text="it raised", why="line 3", fix="mend it")
    assert play.controller.explained == {"w0": ("line 3", "mend it")}


def test_a_worker_that_is_drained_is_told_with_its_next_question():
    play = Play()
    play.where("w0")
    assert isinstance(play.next("w0"), Work)
    play.where("w1")
    play.controller.drain("w0")
    assert play.controller.workers()["w0"]["state"] == "leaving"
    assert play.say(Beat, "w0") == Drain()
    assert play.next("w0") == Drain()
    assert play.where("w0") == Drain()
    assert play.say(Beat, "w1") == Noted()


def test_one_that_has_left_is_drained_and_not_lost_and_its_work_goes_on():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.step("w0", answered=5)
    assert play.say(Leaving, "w0") is None
    for _ in range(2):  # its last word, which may come twice
        play.say(Ended, "w0", code="", text="", is_drained=True)
    play.fence((5, 0))
    assert (play.controller.drained, play.controller.lost) == (["w0"], [])
    assert play.controller.workers()["w0"]["state"] == "drained"
    assert play.next("w1") == Work(epoch=0, start=5, stop=20)


def test_one_that_vanishes_while_it_leaves_is_drained_too():
    play = Play()
    play.where("w0")
    play.say(Leaving, "w0")
    play.controller.lose("w0")
    assert (play.controller.drained, play.controller.lost) == (["w0"], [])


def test_a_name_that_is_started_again_has_no_past():
    play = Play()
    play.where("w0")
    play.controller.drain("w0")
    play.say(Leaving, "w0")
    play.say(Ended, "w0", code="", text="", is_drained=True)
    play.controller.admit("w0")
    assert "w0" not in play.controller.ended
    assert isinstance(play.say(Where, "w0", inc=2, pid=20, host="h"), Shards)
    assert play.controller.workers()["w0"]["state"] == "training"


def lost_with(told: int, *shards):
    """A worker with a lease of 20, of which it has told so much, is lost; what shards have."""
    play = Play(num_shards=len(shards))
    play.where("w0")
    play.next("w0")
    play.step("w0", answered=told)
    play.controller.lose("w0")
    for index, rows in enumerate(shards):
        play.fence(*rows, shard=f"shard{index}")
    play.where("w1")
    return play, play.next("w1"), play.controller.account


def test_what_shards_have_of_a_lost_workers_last_push_is_not_trained_on_again():
    play, work, account = lost_with(4, [(12, 0)], [(12, 0), (12, 0)])
    assert work == Work(epoch=0, start=12, stop=20)
    assert (account.applied, account.partial) == (12, 0)
    assert play.controller.worker_samples["w0"] == 12
    assert play.controller.adds_up


def test_what_only_some_parts_have_is_partial_with_its_fraction():
    play, work, account = lost_with(4, [(12, 0)], [(12, 0), (4, 0)])
    assert work == Work(epoch=0, start=12, stop=20)
    assert (account.applied, account.partial, account.missed) == (4, 8, 8)  # of 8 * 3
    assert play.controller.adds_up


def test_what_no_part_has_goes_out_again():
    play, work, account = lost_with(4, [(4, 0)], [(4, 0)])
    assert work == Work(epoch=0, start=4, stop=20)
    assert (account.applied, play.queue.returned_samples) == (4, 16)
    assert play.controller.adds_up


def test_what_was_refused_before_its_worker_could_tell_is_refused():
    play, work, account = lost_with(4, [(12, 8)], [(12, 8)])
    assert work == Work(epoch=0, start=12, stop=20)
    assert (account.applied, account.refused) == (4, 8)
    assert play.controller.adds_up


@pytest.mark.parametrize(
    ("rows", "applied", "partial", "lost"),
    [([(2, 0), (2, 0)], 2, 0, 8), ([(10, 0), (2, 0)], 2, 8, 0)],
)
def test_what_was_told_and_then_undone_with_a_shard_is_lost_or_partial(
    rows, applied, partial, lost
):
    play, work, account = lost_with(10, *[[row] for row in rows])
    assert work == Work(epoch=0, start=10, stop=20)
    assert (account.applied, account.partial, account.lost) == (applied, partial, lost)
    assert play.controller.adds_up


def test_the_next_process_of_a_lost_worker_waits_until_it_is_known_what_that_had_done():
    play = Play(num_shards=2)
    play.where("w0")
    play.next("w0")
    play.controller.lose("w0")
    play.fence((5, 0), shard="shard0")
    assert play.say(Where, "w0", 2, pid=21, host="h") == Wait()
    assert play.next("w0", inc=2) == Wait()
    play.fence((5, 0), shard="shard1")
    assert isinstance(play.say(Where, "w0", 2, pid=21, host="h"), Shards)
    assert play.next("w0", inc=2) == Work(epoch=0, start=5, stop=20)


def test_a_shard_that_was_restarted_is_told_again_who_is_gone():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.controller.lose("w0")
    assert play.fence() == Noted()
    assert play.say(Beat, "shard0") == Noted()
    play.say(Serving, "shard0", 2, endpoint="tcp://here:0", pid=9, host="h")
    assert play.say(Beat, "shard0", 2) == Fence(w="w0", inc=1)


def test_a_worker_that_has_done_all_that_it_held_needs_no_settling():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.step("w0", answered=20)
    play.end("w0")
    assert not play.controller.is_settling
    assert play.controller.adds_up


def test_every_word_of_a_worker_about_its_samples_is_in_the_account():
    play = Play()
    play.where("w0")
    play.next("w0")
    play.step("w0", answered=12, partial=4, missed=8, spoiled=2, skipped=3, left_out=1)
    account = play.controller.account
    assert (account.applied, account.partial, account.missed, account.refused) == (6, 4, 8, 2)
    assert (account.skipped, account.left_out) == (3, 1)
    assert play.queue.in_flight == 4
    play.step("w0", answered=12)  # an older note may come last
    assert play.controller.adds_up
    play.step("w0", answered=40)  # a script that counts for itself
    assert account.beyond == 24
    assert play.controller.adds_up


def test_a_run_that_may_go_on_with_fewer_waits_for_the_others_not_for_long():
    play = Play(num_workers=3, min_workers=2)
    assert play.where("w0") == Wait()
    play.now = ELASTIC_GATHER_S
    assert play.where("w0") == Wait()
    assert isinstance(play.where("w1"), Shards)


def test_a_worker_that_comes_while_the_run_trains_is_welcome():
    play = Play()
    play.where("w0")
    play.next("w0")
    assert play.where("w7") == Shards(endpoints=("tcp://here:0",), initialise=False)
    assert play.next("w7") == Work(epoch=0, start=20, stop=40)


def test_what_was_not_heard_while_nobody_listened_is_no_silence():
    play = Play()
    play.where("w0")
    play.say(Beat, "shard0", storage_error="")
    play.controller.tick(0.0)
    play.controller.tick(STALL_S)  # in time
    assert play.controller.silent(300.5, patience_s=300.0) == ["w0"]
    play.controller.tick(295.0)
    assert play.controller.silent(301.0, patience_s=300.0) == []
    assert play.controller.heard("shard0") == 295.0 - STALL_S
    play.now = 300.0
    play.say(Beat, "shard0", storage_error="")
    play.controller.tick(300.5)
    assert play.controller.heard("shard0") == 300.5  # not in the future


def test_a_worker_in_quarantine_is_no_error_of_the_run_and_keeps_its_place_until_it_is_lost():
    play = Play()
    play.where("w0")
    play.next("w0")
    text = "shard 0 takes no more: w0 was refused 10 pushes in a row"
    assert play.say(Ended, "w0", code=QUARANTINED, text=text) == Noted()
    assert play.controller.first_error is None
    assert "w0" not in play.controller.ended
    assert play.controller.quarantined == {"w0": text}
    assert play.controller.lose("w0") == 20


def test_pushes_that_were_refused_prove_nothing():
    play = Play()
    play.where("w0")
    play.step("w0", 20, 20, pushed=True, refused=2, reason="NaN")
    assert play.controller.pushed["w0"] == 0
    play.step("w0", 40, 20, pushed=True)
    assert play.controller.pushed["w0"] == 1
    assert play.controller.num_pushed == 2
