"""Standby: the launcher's copy of the controller, and the process that answers in its name.

    workers, shards ──notes──► controller's process ──entries──► standby
                    ◄─answers─                      ◄──orders───

Both go through the same calls in the same order, so both are the same: if the process is killed,
another one begins with the copy. What is read here (`standby.controller`) may be some milliseconds
old, and what was answered is always in it.
"""

import contextlib
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from distbelief.controller.entry import (
    AnyEntry,
    AnyOrder,
    Done,
    Failed,
    Frames,
    Heard,
    Order,
    Ordered,
    Ready,
    Start,
    frame,
)
from distbelief.controller.machine import CONTROLLER, STALL_S, Controller
from distbelief.job import NetConfig
from distbelief.param_server.curve import Keys
from distbelief.problem import Problem
from distbelief.supervisor import Supervisor
from distbelief.workers.notes import NOTES, AnyNote

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.05
SILENCE_S = 10.0
"""A controller that has written nothing for so long is frozen: it is ended and started again. It
ticks twenty times a second."""
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
READ_BYTES = 2**20
READS_MAX = 64
"""In one call, so that the launcher comes to its other work."""


class Standby:
    """See the top of this file. Used by one thread, but for reading `controller.endpoints`."""

    def __init__(
        self,
        controller: Controller,
        net: NetConfig,
        keys: Keys | None,
        logs: Path,
        restarts: int,
        say: Callable[[str], None],
    ) -> None:
        """controller: as it is before anybody was heard. restarts: as `Supervisor`'s limit."""
        self.controller = controller
        self.endpoint = ""
        self.num_restarts = 0
        self._net = net
        self._keys = keys
        self._logs = logs
        self._say = say
        self._supervisor = Supervisor(restarts)
        self._process: subprocess.Popen[bytes] | None = None
        self._inc = 0
        self._is_ready = False
        self._frames = Frames()
        self._out = bytearray()
        """What the process has not taken yet."""
        self._number = 0
        self._pending: dict[int, AnyOrder] = {}
        """Orders that are not carried out yet."""
        self._results: dict[int, Any] = {}  # Any: as each order has it
        self._heard_at = self._followed_at = 0.0

    def start(self) -> None:
        """Start the process and wait until it listens. Raises: Problem."""
        self._spawn()
        try:
            while not self._is_ready:
                self.follow(TICK_S)
        except Problem:
            self.close()
            raise

    def follow(self, timeout_s: float) -> None:
        """Take what has happened since the last call, after waiting a little for the first of it.

        Starts the process again where it is lost. Raises: Problem when it was lost too often.
        """
        now = time.monotonic()
        if now - self._followed_at > STALL_S:
            self._heard_at = now  # nobody has looked
        self._followed_at = now
        if self._process is None:
            if not self._supervisor.due(now):
                time.sleep(timeout_s)
                return
            self._spawn()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        into, out = process.stdin.fileno(), process.stdout.fileno()
        readable, writable, _ = select.select([out], [into] if self._out else [], [], timeout_s)
        if writable:
            self._write(into)
        for _ in range(READS_MAX if readable else 0):
            self._read(out)
            if self._process is None or not select.select([out], [], [], 0.0)[0]:
                break
        silence_s = time.monotonic() - self._heard_at
        if silence_s > (SILENCE_S if self._is_ready else START_TIMEOUT_S):
            self._lose(f"it has said nothing for {silence_s:.0f} s")

    @property
    def is_serving(self) -> bool:
        """There is a process, and it listens."""
        return self._process is not None and self._is_ready

    @property
    def is_current(self) -> bool:
        """The copy knows what was heard until a moment ago."""
        return time.monotonic() - self.controller.ticked_at < STALL_S

    def do(self, order: Order[T]) -> T:
        """Have something done by the process, and here. Raises: as `follow`."""
        self._number += 1
        number, one = self._number, cast(AnyOrder, order)
        self._pending[number] = one
        self._out += frame(Ordered(number, one))
        while number in self._pending:
            self.follow(TICK_S)
        result: T = self._results.pop(number)
        return result

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        _close(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
        process.kill()
        process.wait()

    # Inside

    def _spawn(self) -> None:
        self._inc += 1
        self._frames = Frames()
        self._is_ready = False
        self._heard_at = time.monotonic()
        with (self._logs / f"{CONTROLLER}.out").open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "distbelief.controller.process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # the terminal's Ctrl-C does not reach it
                )
            except OSError as error:
                text = f"the controller's process could not be started: {error}"
                raise Problem("DB-ENV-003", text) from error
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        net = self._net
        start = Start(
            state=self.controller,
            inc=self._inc,
            host=net.host,
            port=net.port,
            wish=int(self.endpoint.rpartition(":")[2] or 0),
            num_peers=self.controller.num_workers,
            is_encrypted=net.is_encrypted,
            keys=None if self._keys is None else self._keys.to_dict(),
            log=str(self._logs / f"{CONTROLLER}.log"),
        )
        self._out = bytearray(frame(start))
        for number, order in self._pending.items():
            self._out += frame(Ordered(number, order))

    def _write(self, descriptor: int) -> None:
        try:
            del self._out[: os.write(descriptor, self._out)]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # seen when it is read
            self._out.clear()

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, READ_BYTES)
        self._heard_at = time.monotonic()
        if not data:
            self._lose("")
            return
        for entry in self._frames.feed(data):
            self._apply(entry)

    def _apply(self, entry: AnyEntry) -> None:
        controller = self.controller
        if isinstance(entry, Heard):
            note = NOTES.decode(entry.note)
            assert isinstance(note, AnyNote)
            controller.handle(note, entry.now, entry.speaker)
            self._supervisor.prove(CONTROLLER)
        elif isinstance(entry, Done):
            result = entry.order.apply(controller)
            if self._pending.pop(entry.number, None) is not None:
                self._results[entry.number] = result
        elif isinstance(entry, Ready):
            controller.serve(entry.inc, entry.pid, entry.host)
            self.endpoint, self._is_ready = entry.endpoint, True
        elif isinstance(entry, Failed):
            if self._inc == 1:
                raise Problem(entry.code, entry.what, entry.why, entry.fix)
            self._lose(entry.what)

    def _lose(self, why: str) -> None:
        """The process is lost, or is to be."""
        process, self._process = self._process, None
        if process is None:
            return
        _close(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.0 if why else END_TIMEOUT_S)  # it has said its last word
        process.kill()
        code = process.wait()
        why = why or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
        self.num_restarts += 1
        if self._supervisor.lose(CONTROLLER, why, time.monotonic()) is None:
            raise Problem(
                "DB-RUN-016",
                f"the controller is lost ({self._supervisor.cause(CONTROLLER)})",
                why=f"its process was lost {self._supervisor.num_lost(CONTROLLER)} times, the last "
                "ones in a row without hearing anybody between",
                fix=f"see {self._logs}; distbelief resume goes on from what was saved",
            )
        self._say(f"the controller is lost ({why}): it is started again where it was")


def _close(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
