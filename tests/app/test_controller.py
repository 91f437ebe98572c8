"""The controller: notes in, answers out; it knows who takes part and who trains on what."""

from collections import Counter

import pytest

from distbelief.controller import Controller
from distbelief.workers.control import (
    Beat,
    Ended,
    Halt,
    Next,
    Noted,
    Serving,
    Shards,
    Stepped,
    Wait,
    Where,
    Work,
)
from distbelief.workers.lease import LeaseQueue


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
    assert play.next("w0") == Work(epoch=0, start=25, stop=40)
    assert play.controller.progress(0.0).num_workers == 1


def test_nothing_is_handed_to_the_dead():
    """A note of a killed worker may still be on its way when its death is noticed."""
    play = Play()
    play.where("w0")
    play.next("w0")
    play.controller.lose("w0")
    assert play.next("w0") is None
    assert play.step("w0", answered=20) is None
    assert play.where("w0") is None
    assert play.queue.done_samples == 0
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
    assert play.controller.began_at is None
    assert "w0" not in play.controller.members


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
    assert play.controller.train_s == 2.0
    assert play.controller.progress(100.0).samples_per_s == 0


def test_before_anything_has_happened_progress_is_empty():
    progress = Play().controller.progress(5.0)
    assert (progress.samples, progress.updates, progress.loss) == (0, 0, None)
    assert (progress.samples_per_s, progress.eta_s) == (0.0, None)
    assert Play().controller.train_s == 0.0


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
    assert play.controller.mean_loss == 1.5
    play.step(samples=0, loss=0.0)  # a note that tells of answers only
    assert play.controller.mean_loss == 1.5


def test_a_loss_weighs_by_its_samples():
    play = Play()
    play.step(samples=30, loss=1.0)
    play.step(samples=10, loss=5.0)
    assert play.controller.mean_loss == 2.0


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
