"""The comm thread: what goes wrong in it reaches whoever waits, and it always ends."""

import threading
from queue import SimpleQueue
from typing import Any

import pytest
from torch import nn

from distbelief.param_server.client import Client
from distbelief.param_server.errors import LocalError, Refused, ShardUnavailable
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience, Ticket
from distbelief.workers.comm import Comm, Inline
from tests.workers.jobs import RUN, TOKEN, Servers, Wire, contract_of


@pytest.fixture
def servers() -> Servers:
    return Servers(contract_of(nn.Linear(3, 2)))


def nothing(_: Client) -> Ticket:
    return Ticket(0)


def deaf_client(servers: Servers) -> Client:
    """A client that says hello well, and then is never answered again."""
    wire = Wire(servers.handlers)
    wire.lose_request = set(range(1, 1000))
    patience = Patience(retry_s=0.02, give_up_s=0.05)
    identity = Identity(run=RUN, w="w0", inc=1, token=TOKEN)
    return Client(wire, list(servers.handlers), identity, servers.contract, patience)


def test_a_call_runs_in_the_thread_and_its_ticket_comes_back(servers):
    names = []

    def call(client: Client) -> Ticket:
        names.append(threading.current_thread().name)
        ticket = Ticket(1)
        ticket.count_down()
        return ticket

    with Comm(servers.client, name="comm-w0") as comm:
        assert comm.connect().contract == servers.contract
        assert comm.submit(call).result(5).is_done
    assert names == ["comm-w0"]


def test_an_error_of_make_client_reaches_connect_and_submit():
    def fail() -> Client:
        raise OSError("no more sockets")

    with Comm(fail) as comm:
        with pytest.raises(OSError, match="no more sockets"):
            comm.connect()
        with pytest.raises(OSError, match="no more sockets"):
            comm.submit(nothing).result(5)


def test_a_refused_hello_reaches_connect(servers):
    with (
        Comm(lambda: servers.client(token="wrong")) as comm,
        pytest.raises(Refused, match="not this job's"),
    ):
        comm.connect()


def test_an_error_of_a_call_reaches_its_caller_and_the_thread_goes_on(servers):
    def fail(_: Client) -> Ticket:
        raise ValueError("not this one")

    with Comm(servers.client) as comm:
        with pytest.raises(ValueError, match="not this one"):
            comm.submit(fail).result(5)
        assert comm.submit(nothing).result(5).is_done


def test_what_is_posted_runs_in_its_turn_and_nobody_waits(servers):
    done = []

    def note(name):
        def call(_: Client) -> Ticket:
            done.append(name)
            return Ticket(0)

        return call

    with Comm(servers.client) as comm:
        comm.connect()
        comm.submit(note("first"))
        for number in range(3):
            comm.post(note(number))
        comm.submit(note("last")).result(5)
    assert done == ["first", 0, 1, 2, "last"]


def test_what_goes_wrong_in_a_post_goes_wrong_for_all_that_was_submitted(servers):
    is_taken = threading.Event()

    def open_for_ever(_: Client) -> Ticket:
        is_taken.set()
        return Ticket(1)

    def fail(_: Client) -> None:
        raise OSError("no more sockets")

    with Comm(servers.client) as comm:
        comm.connect()
        waiting = comm.submit(open_for_ever)
        assert is_taken.wait(5)
        comm.post(fail)
        with pytest.raises(OSError, match="no more sockets"):
            waiting.result(5)
        with pytest.raises(OSError, match="no more sockets"):
            comm.submit(nothing).result(5)
        comm.post(fail)  # into the void


def test_inline_a_post_is_done_when_it_returns(servers):
    client = servers.client()
    client.connect()
    done: list[object] = []
    inline = Inline(client)
    inline.post(done.append)
    assert done == [client]
    client.close()


def test_an_error_of_a_ticket_reaches_its_caller(servers):
    def refused(_: Client) -> Ticket:
        ticket = Ticket(1)
        ticket.error = Refused("fenced", "a ghost")
        return ticket

    with Comm(servers.client) as comm, pytest.raises(Refused, match="a ghost"):
        comm.submit(refused).result(5)


def test_a_silent_shard_reaches_everybody_who_waits_or_comes_later(servers):
    with Comm(lambda: deaf_client(servers)) as comm:
        comm.connect()
        waiting = comm.submit(lambda client: client.start_merge(0, *empty(servers)))
        with pytest.raises(ShardUnavailable, match="has not answered merge"):
            waiting.result(5)
        with pytest.raises(ShardUnavailable):
            comm.submit(nothing).result(5)


def test_a_call_that_comes_while_the_thread_ends_is_answered(servers):
    comm = Comm(lambda: deaf_client(servers))

    class Late(SimpleQueue[Any]):
        """Puts a call in after the thread has looked for the last time."""

        def put(self, item, block=True, timeout=None):
            comm._thread.join()
            super().put(item)

    is_taken = threading.Event()

    def never_answered(client: Client) -> Ticket:
        is_taken.set()
        return client.start_merge(0, *empty(servers))

    with comm:
        comm.connect()
        comm.submit(never_answered)
        assert is_taken.wait(5)
        comm._calls = Late()
        with pytest.raises(ShardUnavailable):
            comm.submit(nothing).result(5)


def test_close_finishes_what_was_submitted(servers):
    servers.gate.clear()
    with Comm(servers.client) as comm:
        comm.connect()
        future = comm.submit(lambda client: client.start_merge(0, *empty(servers)))
        servers.gate.set()
    assert isinstance(future.exception(0), Refused)  # "not-ready", and not lost


def test_close_may_be_called_twice_and_ends_the_thread(servers):
    comm = Comm(servers.client)
    with comm:
        comm.connect()
        comm.close()
        assert not comm._thread.is_alive()
    comm.close()


def test_after_close_a_call_fails(servers):
    with Comm(servers.client) as comm:
        comm.connect()
    with pytest.raises(LocalError, match="the comm thread has ended"):
        comm.submit(nothing).result(0)


def test_close_does_not_wait_for_a_connection_that_failed():
    def fail() -> Client:
        raise OSError("no")

    with Comm(fail) as comm:
        pass
    assert not comm._thread.is_alive()


def empty(servers: Servers):
    return servers.contract.buffers.no_buffers()
