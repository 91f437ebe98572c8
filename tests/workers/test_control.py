"""Control: notes that survive the wire, and a process that notices that it is an orphan."""

from collections import deque
from typing import Any

import hypothesis.strategies as st
import msgpack
import pytest
from hypothesis import given

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.place import NAME
from distbelief.param_server.wire import encode
from distbelief.workers.control import Control, ControllerGone
from distbelief.workers.notes import (
    ANSWERS,
    NOTES,
    Bad,
    Beat,
    Denied,
    Ended,
    Halt,
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

NUMBER = st.integers(0, 2**53 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=50)
NAMES = st.from_regex(NAME, fullmatch=True)
WHO = {"run": NAMES, "token": TEXT, "name": NAMES, "inc": NUMBER}
ME: dict[str, Any] = {"run": "job", "token": "secret", "name": "w0", "inc": 1}
NOTE = st.one_of(
    st.builds(Where, **WHO, pid=NUMBER, host=TEXT, num_samples=NUMBER, digest=TEXT),
    st.builds(Serving, **WHO, endpoint=TEXT, pid=NUMBER, host=TEXT),
    st.builds(
        Beat,
        **WHO,
        storage_error=TEXT,
        saved=TEXT,
        version=NUMBER,
        samples=NUMBER,
        age_s=st.floats(0, 1e6),
    ),
    st.builds(
        Next,
        **WHO,
        taken=NUMBER,
        upto=NUMBER,
        num_samples=NUMBER,
        batch_size=NUMBER,
        is_first=st.booleans(),
        kept=NUMBER,
    ),
    st.builds(Bad, **WHO, samples=st.lists(TEXT).map(tuple), reasons=st.lists(TEXT).map(tuple)),
    st.builds(
        Stepped,
        **WHO,
        answered=NUMBER,
        samples=NUMBER,
        loss=st.floats(allow_nan=False, allow_infinity=False),
        pushed=st.booleans(),
        staleness=NUMBER,
        version=NUMBER,
        refused=NUMBER,
        reason=TEXT,
        knows_loss=st.booleans(),
        skipped=NUMBER,
    ),
    st.builds(Ended, **WHO, code=TEXT, text=TEXT, why=TEXT, fix=TEXT),
)
ANSWER = st.one_of(
    st.builds(Shards, endpoints=st.lists(TEXT).map(tuple), initialise=st.booleans()),
    st.builds(Work, epoch=NUMBER, start=NUMBER, stop=NUMBER),
    st.builds(Wait),
    st.builds(Over),
    st.builds(Denied, text=TEXT),
    st.builds(Halt),
    st.builds(Noted),
)


@given(NOTE)
def test_every_note_survives_the_wire(note):
    assert NOTES.decode(encode(note)) == note


@given(ANSWER)
def test_every_answer_survives_the_wire(answer):
    assert ANSWERS.decode(encode(answer)) == answer


@pytest.mark.parametrize("name", ["", "W0", "../w0", "w0\n", "<b>", "w" * 65, "w 0", ".w0"])
def test_a_note_of_a_name_that_could_be_more_than_a_name_is_refused(name):
    packed = msgpack.packb({"v": 1, "op": "find", **ME, "name": name})
    with pytest.raises(RemoteProtocolError, match="names must match"):
        NOTES.decode(packed)


def test_the_token_is_not_shown():
    assert "secret" not in repr(Next(**ME, taken=0))


class Line:
    """A transport to a controller that gives the answers it was told to, and a clock.

    Waiting for an answer that does not come takes its time; None is an answer lost.
    """

    def __init__(self, *answers) -> None:
        self.now = 0.0
        self.sent: list[object] = []
        self.num_links = 0
        self.answers = deque(answers)
        self.inbox: deque[bytes] = deque()
        self.slept: list[float] = []

    def connect(self, link, endpoint):
        self.num_links += 1
        self.inbox.clear()

    def send(self, link, frames):
        self.sent.append(NOTES.decode(frames[0]))
        answer = self.answers.popleft() if self.answers else None
        if answer is not None:
            self.inbox.append(encode(answer))

    def recv(self, timeout_s):
        if self.inbox:
            return 0, [self.inbox.popleft()]
        self.now += timeout_s
        return None

    def wake(self):
        pass

    def close(self):
        pass

    def control(self, give_up_s=30.0) -> Control:
        return Control(self, "the-endpoint", give_up_s, lambda: self.now, self.slept.append)


def beat() -> Beat:
    return Beat(**{**ME, "name": "shard0"}, storage_error="")


def beat_until(line: Line, control: Control, end: float) -> None:
    while line.now < end:
        line.now += 0.1
        control.hear(beat(), 0.2)


def test_ask_gives_the_answer():
    assert Line(Work(epoch=1, start=2, stop=3)).control().ask(Next(**ME, taken=0)) == Work(
        epoch=1, start=2, stop=3
    )


def test_a_silent_controller_counts_as_gone():
    line = Line()
    with pytest.raises(ControllerGone, match="the-endpoint has not answered next for 30 s"):
        line.control().ask(Next(**ME, taken=0))
    assert 30 <= line.now < 31
    assert len(line.sent) == 6  # every 5 s, each time over a new link


def test_a_question_without_an_answer_is_asked_again_over_a_new_link():
    line = Line(None, None, Work(epoch=0, start=0, stop=4))
    assert line.control().ask(Next(**ME, taken=3)) == Work(epoch=0, start=0, stop=4)
    assert line.sent == [Next(**ME, taken=3)] * 3
    assert line.num_links == 3


def test_a_controller_that_is_gone_is_not_waited_for_again():
    line = Line()
    control = line.control()
    with pytest.raises(ControllerGone):
        control.ask(Next(**ME, taken=0))
    now = line.now
    with pytest.raises(ControllerGone):
        control.ask(Next(**ME, taken=0))
    assert line.now == now


def test_until_asks_again_while_it_has_to_wait_and_finishes_what_is_half_done():
    line, idle = Line(Wait(), Wait(), Work(epoch=0, start=0, stop=4)), []
    work = line.control().until(Next(**ME, taken=0), Work, on_idle=lambda: idle.append(1))
    assert work == Work(epoch=0, start=0, stop=4)
    assert len(line.slept) == len(idle) == 2


def test_until_is_none_at_a_halt():
    idle: list[int] = []
    control = Line(Halt()).control()
    assert control.until(Next(**ME, taken=0), Work, on_idle=lambda: idle.append(1)) is None
    assert idle == [1]


def test_until_refuses_an_answer_of_another_kind():
    with pytest.raises(RemoteProtocolError, match="noted in answer to next"):
        Line(Noted()).control().until(Next(**ME, taken=0), Work)


def test_hear_does_not_wait_and_sends_at_its_pace():
    line = Line(Noted(), Noted(), Halt())
    control = line.control()
    told = []
    for _ in range(40):
        line.now += 0.05
        told.append(control.hear(beat(), 0.2))
        if told[-1] == Halt():
            break
    assert [answer for answer in told if answer] == [Noted(), Noted(), Halt()]
    assert len(line.sent) == 3
    assert 0.6 <= line.now < 1.0


def test_what_an_answer_grants_counts_from_when_the_note_was_sent():
    line = Line(Noted())
    control = line.control()
    line.now = 1.0
    assert control.hear(beat(), 0.2) is None
    line.now = 3.0  # the answer was long on its way
    assert control.hear(beat(), 0.2) == Noted()
    assert control.granted_at == 1.0


def test_hear_raises_when_nobody_has_answered_for_too_long():
    line = Line(Noted())
    control = line.control(give_up_s=10)
    with pytest.raises(ControllerGone, match="the-endpoint is silent"):
        beat_until(line, control, 20)
    assert 10 < line.now < 11


def test_notes_to_a_controller_that_is_gone_do_not_pile_up():
    # A DEALER without a peer takes 64 messages and then blocks its sender for ever.
    line = Line()
    control = line.control(give_up_s=30)
    with pytest.raises(ControllerGone):
        beat_until(line, control, 60)
    assert len(line.sent) < 10
    assert line.num_links == len(line.sent)  # each repetition goes over a link of its own


def test_a_lost_beat_is_made_up_for():
    line = Line(None, Halt())
    control = line.control()
    while control.hear(beat(), 0.2) is None:
        line.now += 0.1
        assert line.now < 10
    assert len(line.sent) == 2


def test_the_answer_to_a_beat_is_not_taken_for_the_answer_to_a_question():
    line = Line(Noted(), Work(epoch=0, start=0, stop=1))
    control = line.control()
    line.now = 1.0
    assert control.hear(beat(), 0.2) is None  # its answer is on the way
    assert control.ask(Next(**ME, taken=0)) == Work(epoch=0, start=0, stop=1)
