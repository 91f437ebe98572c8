"""A shard's values as workers of its host read them: whole and of one version, or not at all."""

import time

import numpy as np
import pytest
import torch

from distbelief.param_server.memory import Memory, is_supported
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.slab import COPIES, ELSEWHERE, ROW, Slab, SlabReader, slab_bytes
from tests.helpers.children import Children, nursery
from tests.helpers.peers import apply_for_ever
from tests.param_server.jobs import (
    LAYOUT,
    TWO_GROUPS,
    FakeTime,
    make_contract,
    make_layout,
    numbers,
)

pytestmark = pytest.mark.skipif(not is_supported(), reason="no shared memory here")

PARTS = LAYOUT.parts


class Pair:
    """Parts in a slab and their reader, in ordinary memory."""

    def __init__(self, layout=LAYOUT, **reader):
        self.layout = layout
        memory = np.zeros(slab_bytes(layout.parts), np.uint8)
        self.slab = Slab(memory, layout.parts)
        contract = make_contract(layout)
        self.parts = [Part(part, contract, self.slab) for part in layout.parts]
        for part in self.parts:
            part.load_({VALUES: numbers(layout)[part.range.start : part.range.stop]})
        self.time = FakeTime()
        self.reader = SlabReader(
            memory, layout.parts, clock=self.time.clock, sleep=self.time.sleep, **reader
        )
        self.into = torch.full((layout.total,), torch.nan)
        self.took = []

    def read(self, *which):
        """Whether it went; what was taken is in `took`, as (index, version, samples)."""
        self.took.clear()
        self.into.fill_(torch.nan)
        parts = [self.layout.parts[i] for i in which] or self.layout.parts
        return self.reader.read(parts, self.into, self.took_one)

    def took_one(self, part, version, samples):
        self.took.append((part.index, version, samples))

    def apply(self, index, seed=1, samples=4):
        part = self.parts[index]
        part.apply_(numbers(seed=seed)[part.range.start : part.range.stop], samples)

    @property
    def values(self):
        return torch.cat([part.values for part in self.parts])

    def assert_read(self, *expected):
        assert self.read()
        assert self.took == list(expected)
        assert torch.equal(self.into, self.values)


def test_the_words_of_a_row_are_where_the_top_of_the_file_says():
    memory = np.zeros(slab_bytes(PARTS), np.uint8)
    # Three rows of 64 bytes, and four buffers of 256, 256 and 236 (rounded up) for each part.
    assert (len(memory), ROW, COPIES) == (3 * 64 + 4 * 3 * 256, 8, 4)
    slab = Slab(memory, PARTS)
    assert memory[:192].view(np.int64).reshape(3, 8).tolist() == [[0, -1, 0, 0, 0, 0, 0, 0]] * 3
    parts = [Part(part, make_contract(), slab) for part in PARTS]
    parts[1].load_({VALUES: torch.arange(64.0)}, version=7, samples=90)
    place = 192 + 4 * 256
    assert memory[64:88].view(np.int64).tolist() == [14, place, 90]
    assert memory[place : place + 256].view(np.float32).tolist() == list(range(64))


def test_what_was_loaded_is_read():
    pair = Pair()
    pair.assert_read((0, 0, 0), (1, 0, 0), (2, 0, 0))
    assert torch.equal(pair.into, numbers())


def test_a_restored_part_is_read_at_its_version():
    pair = Pair()
    pair.parts[1].load_({VALUES: torch.ones(64)}, version=12, samples=48)
    pair.assert_read((0, 0, 0), (1, 12, 48), (2, 0, 0))


def test_what_was_applied_is_read():
    pair = Pair()
    pair.apply(0)
    pair.assert_read((0, 1, 4), (1, 0, 0), (2, 0, 0))
    pair.apply(2)
    pair.apply(0, samples=1)
    pair.assert_read((0, 2, 5), (1, 0, 0), (2, 1, 4))
    assert pair.reader.num_again == 0


def test_a_step_without_any_gradient_is_read_as_a_version():
    pair = Pair(TWO_GROUPS)
    mask = TWO_GROUPS.absent_masks(["w"])[0]
    pair.parts[0].apply_(torch.zeros(64), 4, mask)
    pair.assert_read((0, 1, 4), (1, 0, 0), (2, 0, 0))


def test_only_what_was_asked_for_is_written():
    pair = Pair()
    assert pair.read(2, 0)
    assert pair.took == [(2, 0, 0), (0, 0, 0)]
    assert pair.into[64:128].isnan().all()
    assert torch.equal(pair.into[128:], pair.values[128:])


def test_values_that_somebody_holds_are_followed_to_their_next_buffer():
    pair = Pair()
    before = [part.values.clone() for part in pair.parts]
    pins = [pair.parts[i].pin() for i in (0, 1)]
    pair.apply(0)
    pair.assert_read((0, 1, 4), (1, 0, 0), (2, 0, 0))
    assert torch.equal(pins[0][VALUES], before[0]), "the held buffer is left alone"
    for pin in pins:
        pin.release()
    for seed in range(2, 12):  # round and round the buffers
        pin = pair.parts[0].pin()
        pair.apply(0, seed)
        pair.assert_read((0, seed, 4 * seed), (1, 0, 0), (2, 0, 0))
        pin.release()


def test_values_that_found_no_room_are_not_read_and_are_back_when_there_is_some():
    pair = Pair()
    pins = []
    for seed in range(1, COPIES):
        pins.append(pair.parts[1].pin())
        pair.apply(1, seed)
        pair.assert_read((0, 0, 0), (1, seed, 4 * seed), (2, 0, 0))
    pins.append(pair.parts[1].pin())
    pair.apply(1, COPIES)
    assert pair.slab.place(pair.parts[1].values) == ELSEWHERE
    assert not pair.read()
    assert pair.took == [(0, 0, 0)]
    assert pair.time.slept == [], "there is nothing to wait for"
    for pin in pins:
        pin.release()
    pin = pair.parts[1].pin()
    pair.apply(1, COPIES + 1)
    pin.release()
    pair.assert_read((0, 0, 0), (1, COPIES + 1, 4 * COPIES + 4), (2, 0, 0))


def test_buffers_given_back_are_taken_again_and_strange_ones_are_dropped():
    pair = Pair()
    part = PARTS[0]
    taken = [pair.slab.take(part) for _ in range(COPIES - 1)]  # one has the values
    places = {pair.slab.place(buffer) for buffer in taken}
    assert len(places) == COPIES - 1
    assert ELSEWHERE not in places
    strange = pair.slab.take(part)
    assert pair.slab.place(strange) == ELSEWHERE
    for buffer in (strange, *taken):
        pair.slab.give_back(part, buffer)
    assert {pair.slab.place(pair.slab.take(part)) for _ in range(COPIES - 1)} == places
    assert pair.slab.place(pair.slab.take(part)) == ELSEWHERE


# In the middle of a change


def test_a_part_that_stays_in_the_middle_of_a_change_is_given_up():
    pair = Pair(patience_s=0.5)
    pair.parts[1]._row[0] = 1
    assert not pair.read()
    assert pair.took == [(0, 0, 0), (2, 0, 0)], "the others are there"
    assert 0.5 <= pair.time.now < 0.6
    assert set(pair.time.slept) == {50e-6}


def test_a_part_is_waited_for():
    pair = Pair()
    pair.parts[1]._row[0] = 1

    def finish():
        pair.parts[1]._row[0] = 0

    pair.time.while_asleep = [lambda: None, finish]
    assert pair.read()
    assert pair.took == [(0, 0, 0), (2, 0, 0), (1, 0, 0)]
    assert torch.equal(pair.into, pair.values)


def test_patience_begins_anew_with_each_part_that_could_be_had():
    """A busy shard changes one part after the other: that is no reason to give up."""
    pair = Pair(patience_s=0.5)
    for part in pair.parts:
        part._row[0] = 1

    def finish(index):
        def then():
            pair.time.now += 0.4
            pair.parts[index]._row[0] = 0

        return then

    pair.time.while_asleep = [finish(i) for i in range(3)]
    assert pair.read()
    assert pair.time.now > 1.2


class Interrupted:
    """Between the look at the word and its copy of a part, something happens, once each."""

    def __init__(self, pair, *happenings):
        self._view = pair.reader._view
        self._happenings = list(happenings)
        pair.reader._view = self

    def __call__(self, part, place):
        view = self._view(part, place)
        if self._happenings:
            self._happenings.pop(0)()
        return view


def test_values_that_changed_under_the_copy_are_read_again():
    pair = Pair()
    Interrupted(pair, lambda: pair.apply(0, 1), lambda: pair.apply(1, 2))
    assert pair.read()
    # Read in turn: 0 was changed before its copy and 1 as well, 2 was not; then both again.
    assert pair.took == [(2, 0, 0), (0, 1, 4), (1, 1, 4)]
    assert torch.equal(pair.into, pair.values)
    assert pair.reader.num_again == 2


def test_values_that_moved_under_the_copy_are_read_where_they_are_now():
    pair = Pair()
    pin = pair.parts[0].pin()
    Interrupted(pair, lambda: pair.apply(0), lambda: None, lambda: None, lambda: pair.apply(0))
    assert pair.read()
    assert pair.took == [(1, 0, 0), (2, 0, 0), (0, 2, 8)]
    assert torch.equal(pair.into, pair.values)
    pin.release()


def test_a_change_that_began_under_the_copy_is_waited_for():
    pair = Pair()

    def begin():
        pair.parts[0]._row[0] = 1

    def finish():
        pair.parts[0]._row[0] = 2

    Interrupted(pair, begin)
    pair.time.while_asleep = [finish]
    assert pair.read(0)
    assert pair.took == [(0, 1, 0)]


def test_a_part_that_moves_on_for_ever_is_given_up():
    pair = Pair(patience_s=0.5)
    Interrupted(pair, *[lambda: pair.apply(0)] * 10_000)
    assert not pair.read(0)
    assert pair.took == []
    assert pair.reader.num_again > 1
    assert pair.time.now < 1.0


# What is wrong


@pytest.mark.parametrize("more", [-64, -1, 1, 64])
def test_memory_of_another_size_is_refused(more):
    with pytest.raises(ValueError, match=r"a slab of .* bytes, expected 3264"):
        SlabReader(np.zeros(slab_bytes(PARTS) + more, np.uint8), PARTS)


@pytest.mark.parametrize("place", [0, 64, 192 + 128, 192 + 4 * 256, 10**9, -2, -64])
def test_a_place_where_the_part_cannot_lie_is_refused(place):
    pair = Pair()
    pair.parts[0]._row[1] = place
    with pytest.raises(ValueError, match="part 0 cannot lie at"):
        pair.read()


# Two processes


MEGABYTES = make_layout(("w", (4 * 2**18,), 0), part_max=2**18)
assert len(MEGABYTES.parts) >= 4


@pytest.fixture(scope="module")
def children():
    with nursery("tests.helpers.peers") as context:
        made = Children(context)
        yield made
        made.close()


class Blind:
    """The words of a slab whose sequence numbers never move."""

    def __init__(self, words):
        self._words = words

    def __getitem__(self, at):
        return 0 if at % ROW == 0 else self._words[at]


def hunt(children, seconds, *, pins, is_blind=False):
    """Read while another process writes: (reads of a part, torn ones, highest version)."""
    child = children.start(apply_for_ever, MEGABYTES, pins=pins)
    memory = Memory.open(child.hear(), "shard")
    reader = SlabReader(memory.array(), MEGABYTES.parts)
    if is_blind:
        reader._words = Blind(reader._words)  # type: ignore[assignment]
    into = torch.zeros(MEGABYTES.total)
    at = [0] * len(MEGABYTES.parts)
    reads = torn = 0

    def took(part, version, samples):
        assert version >= at[part.index], "versions never fall"
        at[part.index] = version
        if not is_blind:
            assert samples == version

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (is_blind and torn):
        assert reader.read(MEGABYTES.parts, into, took)
        for part in MEGABYTES.parts:
            values = into[part.start : part.stop]
            low, high = float(values.min()), float(values.max())
            reads += 1
            torn += low != high or not (is_blind or low == at[part.index])
    num_again, highest = reader.num_again, max(at)
    del reader
    memory.close()
    assert child.close() == 0
    return reads, torn, num_again, highest


@pytest.mark.parametrize("pins", [False, True], ids=["in place", "moving"])
def test_nothing_torn_is_read_while_another_process_writes(children, pins):
    reads, torn, num_again, highest = hunt(children, 0.7, pins=pins)
    assert torn == 0
    assert reads > 50
    assert highest > 50
    assert num_again > 0, "the two never met: this test has seen nothing"


def test_without_the_look_at_the_word_torn_values_are_read(children):
    """The hunt above can find what it hunts for."""
    _, torn, _, _ = hunt(children, 3.0, pins=False, is_blind=True)
    if not torn:
        pytest.skip("the two processes never met within 3 s")
