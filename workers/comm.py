"""Comm: the one communication thread of a worker. It makes, uses and closes all its sockets.

The training thread hands over a call on the client and gets a future; nothing else passes
between the two threads.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Protocol

from distbelief.param_server.client import Client
from distbelief.param_server.errors import LocalError
from distbelief.param_server.link import Ticket

logger = logging.getLogger(__name__)

Call = Callable[[Client], Ticket]
_Item = tuple[Callable[[Client], object], "Future[Ticket] | None"]


class Calls(Protocol):
    """Where Downpour's conversations with the shards take place."""

    def connect(self) -> Client:
        """The connected client. Use of it what does not change, nothing else."""
        ...

    def submit(self, call: Call) -> Future[Ticket]:
        """Run `call`; the future has its ticket when that is done, or what went wrong."""
        ...

    def post(self, call: Callable[[Client], object]) -> None:
        """Run `call`, a part of what was submitted before; nobody waits for it.

        What goes wrong in it goes wrong for everything that was submitted.
        """
        ...


class Inline:
    """Runs every call at once, in the caller's thread: for shards of the same process."""

    def __init__(self, client: Client) -> None:
        """client: connected; it stays the caller's."""
        self._client = client
        self._open: list[tuple[Ticket, Future[Ticket]]] = []

    def connect(self) -> Client:
        return self._client

    def submit(self, call: Call) -> Future[Ticket]:
        future: Future[Ticket] = Future()
        try:
            self._open.append((call(self._client), future))
            while self._client.has_open:
                self._client.poll(0.0)
        except Exception as error:  # noqa: BLE001 - handed over, as by Comm
            future.set_exception(error)
            self._open = [one for one in self._open if one[1] is not future]
        self._open = _answer(self._open)
        return future

    def post(self, call: Callable[[Client], object]) -> None:
        call(self._client)
        while self._client.has_open:
            self._client.poll(0.0)
        self._open = _answer(self._open)


class Comm:
    """Runs a client in a thread of its own. A context manager."""

    def __init__(self, make_client: Callable[[], Client], name: str = "comm") -> None:
        """make_client: called in the thread; the client it returns is connected there."""
        self._make_client = make_client
        self._calls: SimpleQueue[_Item] = SimpleQueue()
        self._connected: Future[Client] = Future()
        self._client: Client | None = None
        """Once it is connected."""
        self._failure: Exception | None = None
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def __enter__(self) -> "Comm":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the thread, which connects."""
        self._thread.start()

    def connect(self) -> Client:
        """Wait until the client is connected. Use of it what does not change, nothing else.

        Raises: what `Client.connect` raises.
        """
        return self._connected.result()

    def submit(self, call: Call) -> Future[Ticket]:
        """Run `call` in the thread; the future has its ticket when that is done.

        The future raises what went wrong: Refused, ShardUnavailable.
        """
        future: Future[Ticket] = Future()
        if self._is_closing.is_set() or self._failure is not None:
            future.set_exception(self._failure or LocalError("the comm thread has ended"))
            return future
        self._put(call, future)
        return future

    def post(self, call: Callable[[Client], object]) -> None:
        """See `Calls`. It costs a queue's place and a wake; a future costs as much again."""
        self._put(call, None)

    def close(self) -> None:
        """Finish what was submitted, close the sockets, end the thread. May be called twice."""
        self._is_closing.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join()

    def _put(self, call: Callable[[Client], object], future: "Future[Ticket] | None") -> None:
        self._calls.put((call, future))
        self._answer_left()  # the thread may have ended just before that
        self._wake()

    def _wake(self) -> None:
        if self._client is not None:
            self._client.wake()

    def _run(self) -> None:
        try:
            client = self._make_client()
        except Exception as error:  # noqa: BLE001 - handed to the training thread
            self._fail(error)
            return
        try:
            client.connect()
            self._client = client
            self._connected.set_result(client)
            self._serve(client)
        except Exception as error:  # noqa: BLE001 - handed to the training thread
            self._fail(error)
        finally:
            client.close()
            self._fail(LocalError("the comm thread has ended"))

    def _serve(self, client: Client) -> None:
        open_calls: list[tuple[Ticket, Future[Ticket]]] = []
        try:
            while not (self._is_closing.is_set() and self._calls.empty() and not open_calls):
                if self._is_closing.is_set():  # a push that nobody will finish
                    _abandon([one for one in open_calls if one[0].unsent])
                    open_calls = [one for one in open_calls if not one[0].unsent]
                self._start(client, open_calls)
                # A conversation that is over already must not sit out a poll with nothing to come.
                if not any(ticket.is_done for ticket, _ in open_calls):
                    client.poll(0.1)
                open_calls = _answer(open_calls)
        except Exception as error:
            for _, future in open_calls:
                future.set_exception(error)
            raise

    def _start(self, client: Client, open_calls: list[tuple[Ticket, "Future[Ticket]"]]) -> None:
        while True:
            try:
                call, future = self._calls.get_nowait()
            except Empty:
                return
            if future is None:
                call(client)
                continue
            try:
                ticket = call(client)
                assert isinstance(ticket, Ticket)  # what is submitted returns one
                open_calls.append((ticket, future))
            except Exception as error:  # noqa: BLE001 - handed to the training thread
                future.set_exception(error)

    def _fail(self, error: Exception) -> None:
        """Hand the first error to everybody who waits or comes later."""
        if self._failure is None:
            self._failure = error
            logger.debug("comm ended: %s", error)
        if not self._connected.done():
            self._connected.set_exception(error)
        self._answer_left()

    def _answer_left(self) -> None:
        """Fail what nobody will run any more; nothing while the thread serves."""
        while self._failure is not None:
            try:
                _, future = self._calls.get_nowait()
            except Empty:
                return
            if future is not None:
                future.set_exception(self._failure)


def _answer(
    calls: list[tuple[Ticket, "Future[Ticket]"]],
) -> list[tuple[Ticket, "Future[Ticket]"]]:
    """Set the futures of the tickets that are done; returns the others."""
    still: list[tuple[Ticket, Future[Ticket]]] = []
    for ticket, future in calls:
        if not ticket.is_done:
            still.append((ticket, future))
        elif ticket.error is not None:
            future.set_exception(ticket.error)
        else:
            future.set_result(ticket)
    return still


def _abandon(calls: list[tuple[Ticket, "Future[Ticket]"]]) -> None:
    for _, future in calls:
        future.set_exception(LocalError("the comm thread has ended in the middle of a push"))
