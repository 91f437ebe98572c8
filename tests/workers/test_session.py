"""A script's session against a real controller: leases, what was answered, stop, and the end."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from distbelief.param_server.errors import Refused
from distbelief.workers import session
from distbelief.workers.downpour import Downpour
from distbelief.workers.joined import BEAT_S, TOLD_MAX
from distbelief.workers.loader import DataLoader
from distbelief.workers.notes import Beat, Halt, Next, Noted, Stepped
from distbelief.workers.session import Stopped, WorkerInfo, worker
from tests.helpers.solo import Numbers, Script, linear

SIZE = 4
"""Samples in a batch."""


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    session.set_current(None)
    yield
    session.set_current(None)


class Trainer:
    """A script with a model, a loader and Downpour, on one worker."""

    def __init__(self, script: Script, index: int = 0, num_samples: int = 40, **options):
        self.script, self.index = script, index
        self.here = script.be(index)
        self.model = linear(1, 1)
        self.optimizer = Downpour(self.model.parameters(), lr=1e-5, **options)
        self.loader = DataLoader(Numbers(num_samples), SIZE, shuffle=True)

    def backward(self, batch: torch.Tensor) -> None:
        self.model(batch.float()[:, None]).mean().backward()

    def step(self, batch: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(batch)
        self.optimizer.step()

    def epoch(self) -> None:
        self.script.be(self.index)
        for batch in self.loader:
            self.step(batch)

    @property
    def stepped(self) -> list[Stepped]:
        name = f"w{self.index}"
        return [n for n in self.script.notes if isinstance(n, Stepped) and n.name == name]


def test_every_sample_of_a_step_is_answered_and_told():
    with Script() as script:
        trainer = Trainer(script)
        trainer.epoch()
        assert script.queue.done_samples == 40
        assert script.queue.unfinished_samples == 0
        assert script.controller.worker_samples["w0"] == 40
        steps = [note for note in trainer.stepped if note.samples]
        assert [note.answered for note in steps] == list(range(4, 41, 4))
        assert [note.version for note in steps] == list(range(1, 11))
        assert next(iter(script.shard.parts.values())).samples == 40


def test_the_parameters_are_there_before_the_first_step():
    with Script(2) as script:
        first = Trainer(script)
        assert script.controller.is_initialised
        second = Trainer(script, 1)
        with torch.no_grad():
            assert second.model.weight.equal(first.model.weight)
        assert script.controller.workers() == {
            name: {"state": "training", "samples": 0} for name in ("w0", "w1")
        }


def test_the_first_worker_brings_the_parameters_and_the_others_take_them():
    with Script(2) as script:
        Trainer(script)
        script.be(1)
        other = nn.Linear(1, 1)
        Downpour(other.parameters(), lr=1e-5)
        assert torch.cat([other.weight.view(-1), other.bias]).equal(script.values)


def test_a_second_downpour_in_one_process_is_refused():
    with Script() as script:
        trainer = Trainer(script)
        with pytest.raises(ValueError, match="has a Downpour already: give all parameters to one"):
            Downpour(linear().parameters(), lr=0.1)
        trainer.epoch()  # the first one goes on


def test_without_a_step_nothing_of_a_lease_is_done():
    with Script() as script:
        trainer = Trainer(script)
        batches = iter(trainer.loader)
        trainer.step(next(batches))
        trainer.backward(next(batches))  # whose step does not come
        next(batches)
        assert script.queue.done_samples == SIZE


def test_a_gradient_across_the_end_of_an_epoch_is_of_both():
    """Accumulation over 4 batches of an epoch of 10: two are left, and their step comes later."""
    with Script() as script:
        trainer = Trainer(script)
        number = 0
        for _ in range(2):
            for batch in trainer.loader:
                trainer.backward(batch)
                number += 1
                if number % 4 == 0:
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()
        assert number == 20  # nothing went out twice
        assert script.queue.done_samples == 80
        assert script.queue.unfinished_samples == 0
        assert [note.samples for note in trainer.stepped if note.samples] == [4 * SIZE] * 5
        assert script.controller.skipped_samples == 0


def test_a_gradient_that_is_thrown_away_is_skipped_not_answered():
    with Script() as script:
        trainer = Trainer(script)
        for number, batch in enumerate(trainer.loader):
            trainer.optimizer.zero_grad()
            trainer.backward(batch)
            if number % 5:
                trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.here.end()
        assert script.controller.skipped_samples == 2 * SIZE
        assert script.controller.worker_samples["w0"] == 8 * SIZE
        assert script.queue.done_samples == 40
        assert script.queue.unfinished_samples == 0


def test_what_drop_last_drops_is_skipped():
    with Script() as script:
        trainer = Trainer(script, num_samples=43)
        trainer.loader = DataLoader(Numbers(43), SIZE, shuffle=True, drop_last=True)
        trainer.epoch()
        assert script.queue.unfinished_samples == 3
        trainer.here.end()
        assert script.queue.unfinished_samples == 0
        assert script.controller.skipped_samples == 3
        assert script.controller.worker_samples["w0"] == 40


def test_an_early_break_leaves_the_rest_to_others():
    with Script(2) as script:
        first, second = Trainer(script), Trainer(script, 1)
        script.be(0)
        for number, batch in enumerate(first.loader):
            first.step(batch)
            if number == 2:
                break
        script.be(0)
        first.epoch()  # takes what is left of epoch 0, and epoch 1
        assert script.queue.done_samples == 80
        second.epoch()
        assert script.queue.done_samples == 80  # nothing was left


@pytest.mark.parametrize(
    "options",
    [{"n_push": 3}, {"fetch_policy": "latest"}, {"n_push": 2, "fetch_policy": "latest"}],
)
def test_what_has_accrued_is_pushed_before_the_next_epoch(options):
    with Script() as script:
        trainer = Trainer(script, **options)
        for _ in range(3):
            trainer.epoch()
        trainer.here.end()
        assert script.queue.done_samples == 120
        assert script.controller.worker_samples["w0"] == 120
        assert script.queue.unfinished_samples == 0
        assert next(iter(script.shard.parts.values())).samples == 120


def test_a_lost_worker_gives_back_what_it_had_not_finished():
    with Script(2) as script:
        first, second = Trainer(script), Trainer(script, 1)
        script.be(0)
        batches = iter(first.loader)
        for _ in range(3):
            first.step(next(batches))
        assert script.controller.lose("w0") == SIZE  # a lease is of four batches
        script.beat()
        second.epoch()
        assert script.queue.done_samples == 40
        assert script.controller.worker_samples == {"w0": 12, "w1": 28}
        script.be(0)
        batch = next(batches)
        with pytest.raises(Refused, match="w0 incarnation 1 was replaced"):  # it is a ghost
            first.step(batch)


def test_a_script_that_is_drained_is_ended_and_what_it_has_accrued_is_pushed():
    with Script(2) as script:
        first = Trainer(script, n_push=3)
        joined = script.be(0)
        batches = iter(first.loader)
        for _ in range(2):
            first.step(next(batches))
        joined._is_leaving = lambda: True
        with pytest.raises(Stopped):
            first.step(next(batches))
        assert joined.is_drained
        assert joined.is_stopped
        joined.end()
        assert script.controller.is_leaving("w0")
        assert next(iter(script.shard.parts.values())).samples == 3 * SIZE
        assert script.queue.done_samples == 3 * SIZE


def test_the_samples_of_a_position_are_gone_on_from():
    with Script(seed=9) as script:
        trainer = Trainer(script)
        batches = iter(trainer.loader)
        done = []
        for _ in range(3):
            batch = next(batches)
            done += batch.tolist()
            trainer.step(batch)
        next(batches)  # handed out, not trained on
        position = script.queue.position
    with Script(seed=9, position=position) as script:
        trainer = Trainer(script)
        for batch in trainer.loader:
            done += batch.tolist()
            trainer.step(batch)
        assert sorted(done) == list(range(40))
        assert script.queue.done_samples == 40


def test_a_stop_is_heard_between_two_steps():
    with Script() as script:
        trainer = Trainer(script, num_samples=4000)
        batches = iter(trainer.loader)
        trainer.step(next(batches))
        script.queue.stop()
        trainer.step(next(batches))  # nobody has asked since
        script.now += BEAT_S
        with pytest.raises(Stopped) as stopped:
            trainer.step(next(batches))
        assert stopped.value.code == 0
        assert trainer.here.is_stopped
        assert script.queue.done_samples == 3 * SIZE  # the step itself was taken


def test_a_stop_is_heard_where_a_lease_is_asked_for():
    with Script() as script:
        trainer = Trainer(script)
        script.queue.stop()
        with pytest.raises(Stopped):
            next(iter(trainer.loader))


def test_a_stop_before_the_shards_serve_ends_the_script():
    with Script() as script:
        here = script.be()
        here._control.ask = lambda note: Halt()  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            Downpour(linear().parameters(), lr=0.1)
        here.end()


def test_fast_steps_ask_before_the_queue_of_their_notes_is_full():
    """A controller that is gone reads nothing: a note more than the queue holds blocks."""
    with Script() as script:
        trainer = Trainer(script, num_samples=4000)
        for batch, _ in zip(trainer.loader, range(10 * TOLD_MAX), strict=False):
            trainer.step(batch)
        unanswered, most = 0, 0
        for note in script.notes:
            unanswered = unanswered + 1 if isinstance(note, Stepped) else 0
            most = max(most, unanswered)
        assert most <= TOLD_MAX
        assert sum(isinstance(note, Beat) for note in script.notes) >= 9


def test_a_loss_that_is_known_is_told_and_one_that_is_nan_does_no_harm():
    with Script() as script:
        trainer = Trainer(script)
        losses = iter([0.5, float("nan"), None])

        def closure():
            trainer.optimizer.zero_grad()
            trainer.backward(torch.ones(SIZE))
            return next(losses)

        for _ in range(3):
            trainer.optimizer.step(closure, samples=SIZE)
        told = [(note.loss, note.knows_loss) for note in trainer.stepped[1:]]
        assert told == [(0.5, True), (0.0, False), (0.0, False)]
        assert script.controller.pace.mean_loss == 0.5


def test_a_loader_that_somebody_else_put_around_the_sampler_is_named():
    with Script() as script:
        trainer = Trainer(script)
        theirs: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            Numbers(40), SIZE, sampler=trainer.loader.sampler
        )
        batches = iter(theirs)
        with pytest.raises(ValueError, match="has made a loader of its own around its sampler"):
            trainer.step(next(batches))


def test_workers_that_share_no_data_are_warned(caplog):
    with Script(3) as script:
        trainer = Trainer(script)
        for _ in range(2):
            trainer.step(torch.ones(SIZE))
        assert caplog.text.count("each of the 3 workers goes through all of the data") == 1


def test_the_end_pushes_what_is_left_merges_and_leaves():
    with Script() as script:
        here = script.be()
        model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
        optimizer = Downpour(model.parameters(), lr=1e-5, module=model, n_push=100)
        for batch in DataLoader(Numbers(40), SIZE, shuffle=True):
            optimizer.zero_grad()
            model(batch.float()[:, None]).mean().backward()
            optimizer.step()
        assert script.queue.done_samples == SIZE  # the first push carries one gradient
        here.end()
        assert script.queue.done_samples == 40
        assert optimizer.answered_samples == 40
        assert "w0" in script.shard._has_left


def test_a_question_asked_again_gets_the_same_lease():
    with Script() as script:
        here = script.be()
        iteration = here.iterate()
        first = here.take(40, SIZE, iteration)
        here._leases -= 1  # as where the answer was lost
        assert here.take(40, SIZE, iteration) == first
        assert sum(isinstance(note, Next) for note in script.notes) == 2


def test_a_worker_knows_its_index():
    with Script(3) as script:
        script.be(2)
        assert worker() == WorkerInfo(index=2, count=3)


def test_a_worker_starts_with_the_others():
    """In a short run the first one would else do everything alone."""
    with Script(2) as script:
        first = Trainer(script)
        script.controller._alive["w1"] = 1  # has asked for the shards, and builds its model
        script.now = 1.0
        script.controller._gathering_since = 1.0
        batches = iter(first.loader)
        next(batches)
        assert script.now >= 61  # nobody came for a minute
        assert isinstance(script.controller.handle(beat_of(script), script.now), Noted)


def beat_of(script: Script) -> Beat:
    return Beat(**script.sessions[0]._who)
