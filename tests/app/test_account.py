"""The account: whatever happens to workers and their pushes, every sample has one fate."""

from collections import Counter, deque
from dataclasses import asdict, dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distbelief.controller.account import Tally
from distbelief.controller.machine import Controller
from distbelief.workers.lease import LeaseQueue
from distbelief.workers.notes import (
    Beat,
    Ended,
    Fence,
    Fenced,
    Halt,
    Next,
    Serving,
    Stepped,
    Where,
    Work,
)

SAMPLES, EPOCHS = 24, 2
NAMES = ("w0", "w1", "w2")
Place = tuple[int, int]
"""Epoch, and position in its order."""


@dataclass
class Replica:
    """A worker as it sees itself."""

    inc: int
    places: deque[Place] = field(default_factory=deque)
    """What it has taken and not done with."""
    taken: int = 0
    answered: int = 0
    partial: int = 0
    missed: int = 0
    spoiled: int = 0
    skipped: int = 0
    must_tell: bool = False
    """A push was refused: of that nobody else knows whether it was the same everywhere."""


class Story(RuleBasedStateMachine):
    """Two shards, three workers that come, push, skip, and vanish in the middle of a push."""

    @initialize(parts=st.tuples(st.integers(1, 3), st.integers(1, 3)))
    def begin(self, parts):
        self.queue = LeaseQueue(SAMPLES, 6, EPOCHS)
        self.controller = Controller("job", "secret", self.queue, 2, EPOCHS)
        self.parts = [(shard, part) for shard in (0, 1) for part in range(parts[shard])]
        self.rows: dict[tuple[str, int], dict[tuple[int, int], list[int]]] = {}
        """By process and part: samples, and how many of them were refused."""
        self.has: Counter[tuple[Place, tuple[int, int]]] = Counter()
        """How often a part has applied a sample."""
        self.fates: Counter[str] = Counter()
        self.alive: dict[str, Replica] = {}
        self.incs = dict.fromkeys(NAMES, 0)
        for shard in (0, 1):
            self.say(Serving, f"shard{shard}", 1, endpoint=f"tcp://{shard}", pid=1, host="h")

    def say(self, kind, name, inc, **fields):
        note = kind(run="job", token="secret", name=name, inc=inc, **fields)
        return self.controller.handle(note, 0.0)

    def tell(self, name):
        me = self.alive[name]
        me.must_tell = False
        told = {
            "answered": me.answered,
            "partial": me.partial,
            "missed": me.missed,
            "spoiled": me.spoiled,
            "skipped": me.skipped,
        }
        nothing = {"pushed": False, "staleness": 0, "version": 0, "refused": 0, "reason": ""}
        self.say(Stepped, name, me.inc, samples=0, loss=0.0, **nothing, **told)

    def beat(self, shard):
        answer = self.say(Beat, f"shard{shard}", 1)
        while isinstance(answer, Fence):
            rows = self.rows.get((answer.w, answer.inc), {})
            found = [rows.get(part, [0, 0]) for part in self.parts if part[0] == shard]
            fields = asdict(Tally.of([(samples, refused) for samples, refused in found]))
            answer = self.say(Fenced, f"shard{shard}", 1, w=answer.w, of_inc=answer.inc, **fields)

    def apply(self, name, places, parts, refusing=()):
        """Some parts take a push; some of those refuse it."""
        rows = self.rows.setdefault((name, self.alive[name].inc), {})
        for part in parts:
            row = rows.setdefault(part, [0, 0])
            row[0] += len(places)
            if part in refusing:
                row[1] += len(places)
            else:
                self.has.update((place, part) for place in places)

    def take(self, name):
        me = self.alive[name]
        answer = self.say(Next, name, me.inc, taken=me.taken)
        if isinstance(answer, Work):
            me.taken += 1
            me.places += [(answer.epoch, at) for at in range(answer.start, answer.stop)]
        return answer

    @rule(name=st.sampled_from(NAMES))
    def come(self, name):
        if name not in self.alive:
            self.incs[name] += 1
            self.alive[name] = Replica(self.incs[name])
            self.say(Where, name, self.incs[name], pid=1, host="h")

    @rule(name=st.sampled_from(NAMES))
    def lease(self, name):
        if name in self.alive:
            self.take(name)

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 9), data=st.data())
    def push(self, name, count, data):
        me = self.alive.get(name)
        if me is None or not me.places:
            return
        places = [me.places.popleft() for _ in range(min(count, len(me.places)))]
        refusing = data.draw(st.one_of(st.just([]), st.sets(st.sampled_from(self.parts))))
        self.apply(name, places, self.parts, refusing)
        me.answered += len(places)
        if len(refusing) == len(self.parts):
            me.spoiled += len(places)
        elif refusing:
            me.partial += len(places)
            me.missed += len(places) * len(refusing)
        me.must_tell = me.must_tell or bool(refusing)
        if data.draw(st.booleans()):  # else the note is lost, and the next one makes up for it
            self.tell(name)

    @rule(name=st.sampled_from(NAMES), count=st.integers(1, 4))
    def skip(self, name, count):
        me = self.alive.get(name)
        if me is not None and me.places:
            count = min(count, len(me.places))
            for _ in range(count):
                me.places.popleft()
            me.skipped += count
            self.tell(name)

    @rule(name=st.sampled_from(NAMES), count=st.integers(0, 9), data=st.data())
    def vanish(self, name, count, data):
        """A worker is killed, maybe in the middle of a push."""
        if name not in self.alive:
            return
        me = self.alive[name]
        if me.must_tell or data.draw(st.booleans()):
            self.tell(name)
        places = [me.places.popleft() for _ in range(min(count, len(me.places)))]
        if places:
            self.apply(name, places, data.draw(st.sets(st.sampled_from(self.parts))))
        self.controller.lose(name)
        del self.alive[name]

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name):
        if name in self.alive:
            self.tell(name)
            self.say(Ended, name, self.alive.pop(name).inc, code="", text="", is_drained=True)

    @rule(shard=st.integers(0, 1))
    def shard_beats(self, shard):
        self.beat(shard)

    @invariant()
    def every_sample_that_was_handed_out_is_somewhere(self):
        assert self.controller.adds_up

    @invariant()
    def no_part_has_a_sample_twice(self):
        assert not self.has or max(self.has.values()) == 1

    def teardown(self):
        """A good worker does the rest: each sample of each epoch then has its one fate."""
        if not hasattr(self, "queue"):
            return
        for name in list(self.alive):
            self.leave(name)
        for shard in (0, 1):
            self.beat(shard)
        assert not self.controller.is_settling
        self.come("w0")
        while not isinstance(self.take("w0"), Halt):
            me = self.alive["w0"]
            places = list(me.places)
            me.places.clear()
            self.apply("w0", places, self.parts)
            me.answered += len(places)
            self.tell("w0")
            for shard in (0, 1):
                self.beat(shard)
        account = self.controller.account
        numbers = Counter(
            sum((place, part) in self.has for part in self.parts)
            for place in [(epoch, at) for epoch in range(EPOCHS) for at in range(SAMPLES)]
        )
        whole = len(self.parts)
        assert account.applied == numbers[whole]
        assert account.partial == sum(numbers[n] for n in range(1, whole))
        assert account.missed == sum(numbers[n] * (whole - n) for n in range(1, whole))
        assert account.refused + account.skipped == numbers[0]
        assert (account.lost, account.beyond, account.left_out) == (0, 0, 0)
        assert self.queue.handed_out - self.queue.returned_samples == EPOCHS * SAMPLES
        assert self.controller.adds_up


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=40, stateful_step_count=30)
