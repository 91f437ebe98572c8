"""ControllerProcess: the process that workers and shards speak with.

It has the controller's state machine and a socket, and nothing that takes long to import. What it
hears it writes to the launcher before it answers: the launcher's copy (standby.py) is therefore
never behind an answer, and if this process is killed the next one begins where it was.

    standard input    start, orders     it ends with it: the launcher is gone
    standard output   entries
"""

import contextlib
import logging
import os
import select
import socket
import time

import zmq

from distbelief.controller.entry import (
    AnyEntry,
    Done,
    Failed,
    Frames,
    Heard,
    Ordered,
    Ready,
    Start,
    Tick,
    frame,
)
from distbelief.controller.machine import Controller
from distbelief.listen import listen
from distbelief.open_files import allow_files
from distbelief.param_server.curve import DoorkeeperFailed, Keys
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.transport import ZmqServer
from distbelief.param_server.wire import encode
from distbelief.problem import Problem
from distbelief.workers.notes import NOTES, AnyNote

logger = logging.getLogger(__name__)

TICK_S = 0.05
AT_ONCE = 1000
"""Notes taken before orders are looked for."""
PIPE_BYTES = 2**20

_IN, _OUT = 0, 1


class Pipes:
    """Standard input and output, as entries. Used by one thread."""

    def __init__(self) -> None:
        self._frames = Frames()
        self._entries: list[AnyEntry] = []
        """Read, and not taken."""
        os.set_blocking(_IN, False)

    def take(self) -> list[AnyEntry]:
        """What is there. Raises: EOFError when the launcher is gone."""
        self._read()
        entries, self._entries = self._entries, []
        return entries

    def take_start(self) -> Start:
        """The first entry, which is waited for. Raises: as `take`."""
        while not self._entries:
            select.select([_IN], [], [])
            self._read()
        start = self._entries.pop(0)
        assert isinstance(start, Start)
        return start

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(_IN, PIPE_BYTES)
            if not data:
                raise EOFError
            self._entries += self._frames.feed(data)

    def put(self, entry: AnyEntry) -> None:
        """Returns when the entry is the launcher's, whatever happens here.

        Raises: BrokenPipeError.
        """
        data = memoryview(frame(entry))
        while data:
            data = data[os.write(_OUT, data) :]


def serve(controller: Controller, inbox: ZmqServer, pipes: Pipes) -> None:
    """Answer notes and carry out orders, for ever. Raises: EOFError, BrokenPipeError."""
    ticked_at = float("-inf")
    while True:
        inbox.wait(TICK_S, _IN)
        now = time.monotonic()
        if now - ticked_at >= TICK_S:
            ticked_at = now
            inbox.bound_intake(lambda _: 0)  # a note is short, whoever sends it
            tick = Tick(now)
            tick.apply(controller)
            pipes.put(Done(0, tick))
        for entry in pipes.take():
            assert isinstance(entry, Ordered)
            entry.order.apply(controller)
            pipes.put(Done(entry.number, entry.order))
        for _ in range(AT_ONCE):
            if not answer_one(controller, inbox, pipes):
                break


def answer_one(controller: Controller, inbox: ZmqServer, pipes: Pipes) -> bool:
    """Answer a note that is there; False if there is none."""
    try:
        received = inbox.recv(0.0)
        if received is None:
            return False
        peer, frames = received
        data = bytes(frames[0]) if frames else b""
        note = NOTES.decode(data)
    except RemoteProtocolError as error:
        logger.debug("junk: %s", error)
        return True
    assert isinstance(note, AnyNote)  # the codec knows no other messages
    now = time.monotonic()
    answer = controller.handle(note, now, inbox.speaker)
    pipes.put(Heard(data, now, inbox.speaker))
    if answer is not None:
        inbox.send(peer, [encode(answer)])
    return True


def main() -> None:
    """Entry of the process: be the controller that the first entry says."""
    pipes = Pipes()
    try:
        start = pipes.take_start()
    except EOFError:
        return
    logging.basicConfig(
        filename=start.log,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # Never ended in order: whoever ends this process waits for no thread of ZeroMQ's.
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        allow_files(start.num_peers)
        keys = None if start.keys is None else Keys.from_dict(start.keys)
        inbox = listen(context, start.host, start.port, start.wish, keys, start.is_encrypted)
    except Problem as error:
        pipes.put(Failed(error.code, error.what, error.why, error.fix))
        return
    except DoorkeeperFailed as error:
        pipes.put(Failed("DB-RUN-001", str(error), "", ""))
        return
    code = 0
    try:
        ready = Ready(inbox.endpoint, start.inc, os.getpid(), socket.gethostname())
        start.state.serve(ready.inc, ready.pid, ready.host)
        pipes.put(ready)
        logger.info("controller %d pid=%d serves at %s", ready.inc, ready.pid, inbox.endpoint)
        serve(start.state, inbox, pipes)
    except (EOFError, BrokenPipeError):
        logger.info("the launcher is gone, or has done with it")
    except Exception:
        logger.exception("the controller failed")
        code = 1
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
