"""Control: a process's line to the controller: it asks, asks again, and gives up in the end."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distbelief.param_server import wire
from distbelief.param_server.errors import DistBeliefError, RemoteProtocolError
from distbelief.param_server.identity import Identity
from distbelief.param_server.transport import ClientTransport
from distbelief.workers.notes import (
    ANSWERS,
    AnyAnswer,
    AnyNote,
    Bad,
    Beat,
    Drain,
    Fenced,
    Find,
    Halt,
    Leaving,
    Shards,
    Stepped,
    Wait,
)

PAUSE_S = 0.1
"""Between two questions when the answer was to wait."""

RETRY_S = 5.0
"""A note without an answer for so long is sent again, over a new link; all may come twice."""

LOCATE_S = 0.5
"""A question for the shards' endpoints takes no longer."""

_A = TypeVar("_A")


class ControllerGone(DistBeliefError):
    """The controller has not answered for too long: this process is an orphan and should end."""


class Control:
    """One process's line to the controller. Used by one thread."""

    def __init__(
        self,
        transport: ClientTransport,
        endpoint: str,
        give_up_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._give_up_s = give_up_s
        self._clock = clock
        self._sleep = sleep
        self._asked_at = self._answered_at = clock()
        self.granted_at = self._asked_at
        """When the newest note that `hear` has an answer to was sent."""
        self._is_beat_open = False
        self._is_gone = False
        transport.connect(0, endpoint)

    def tell(self, note: Stepped | Bad | Leaving) -> None:
        """Send a note that has no reply; it may be lost with the controller."""
        self._transport.send(0, [wire.encode(note)])

    def ask(self, note: AnyNote) -> AnyAnswer:
        """Send a note and wait for its answer, asking again where that does not come.

        Raises: ControllerGone after `give_up_s`, and at once from then on; RemoteProtocolError.
        """
        if self._is_beat_open:  # or its answer would be taken for this note's
            self._connect_anew()
        began = self._clock()
        while not self._is_gone and self._clock() - began < self._give_up_s:
            self._transport.send(0, [wire.encode(note)])
            asked = self._clock()
            while self._clock() - asked < min(RETRY_S, self._give_up_s):
                received = self._transport.recv(min(0.5, self._give_up_s))
                if received is not None and not received[1]:
                    break  # cut: what was on its way is gone
                if received is not None:
                    answer = ANSWERS.decode(received[1][0])
                    assert isinstance(answer, AnyAnswer)  # the codec knows no other messages
                    return answer
            self._connect_anew()
        self._is_gone = True
        raise ControllerGone(
            f"the controller at {self._endpoint} has not answered {note.op} for "
            f"{self._give_up_s:.0f} s: was the launcher killed?"
        )

    def until(
        self, note: AnyNote, kind: type[_A], on_idle: Callable[[], None] | None = None
    ) -> _A | None:
        """Ask until the answer is not to wait; None if it is to halt, or to leave.

        on_idle: called each time before waiting or halting, to finish what is half done.

        Raises: as `ask`; RemoteProtocolError for an answer of another kind.
        """
        while True:
            answer = self.ask(note)
            if isinstance(answer, kind):
                return answer
            if on_idle is not None:
                on_idle()
            if isinstance(answer, Halt | Drain):
                return None
            if not isinstance(answer, Wait):
                raise RemoteProtocolError(f"{answer.op} in answer to {note.op}")
            self.pause()

    def pause(self) -> None:
        """Let the time between two questions pass."""
        self._sleep(PAUSE_S)

    def hear(self, note: Beat | Fenced, every_s: float) -> AnyAnswer | None:
        """Send a note every so often without waiting; returns the answer to an earlier one.

        Raises: ControllerGone if no answer has come for `give_up_s`.
        """
        now = self._clock()
        received = self._transport.recv(0)
        if received is not None and not received[1]:
            self._connect_anew()
        elif received is not None:
            self._answered_at, self.granted_at = now, self._asked_at
            self._is_beat_open = False
            answer = ANSWERS.decode(received[1][0])
            assert isinstance(answer, AnyAnswer)  # the codec knows no other messages
            return answer
        # One at a time: a queue full of notes to a controller that is gone would block `send`.
        if now - self._asked_at >= (max(every_s, RETRY_S) if self._is_beat_open else every_s):
            if self._is_beat_open:
                self._connect_anew()
            self._transport.send(0, [wire.encode(note)])
            self._asked_at = now
            self._is_beat_open = True
        if now - self._answered_at > self._give_up_s:
            self._is_gone = True
            raise ControllerGone(f"the controller at {self._endpoint} is silent")
        return None

    def close(self) -> None:
        self._transport.close()

    def _connect_anew(self) -> None:
        self._transport.connect(0, self._endpoint)
        self._is_beat_open = False


class Locator:
    """Asks the controller where the shards are, over a line of its own. Used by one thread."""

    def __init__(
        self, who: Identity, make_transport: Callable[[], ClientTransport], endpoint: str
    ) -> None:
        """make_transport: called with each question; who: of the worker."""
        self._who = who
        self._make_transport = make_transport
        self._endpoint = endpoint

    def __call__(self) -> Sequence[str]:
        """The endpoints, in the order of the shards; none if nobody can say for now."""
        me = self._who
        control = Control(self._make_transport(), self._endpoint, give_up_s=LOCATE_S)
        try:
            answer = control.ask(Find(run=me.run, token=me.token, name=me.w, inc=me.inc))
        except (ControllerGone, RemoteProtocolError):
            return ()
        finally:
            control.close()
        return answer.endpoints if isinstance(answer, Shards) else ()
