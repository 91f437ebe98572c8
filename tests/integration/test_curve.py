"""Real sockets with keys: who is let in, who is not, and who speaks."""

import contextlib
import threading
from collections.abc import Iterator
from types import MappingProxyType

import pytest
import zmq

from distbelief.param_server import curve
from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.curve import Doorkeeper, DoorkeeperFailed, Keys, Pair, knock
from distbelief.param_server.errors import Refused
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience
from distbelief.param_server.server import ShardServer
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.transport import ZmqClient, ZmqServer
from distbelief.param_server.update import SGD
from tests.helpers.collector import start_collector
from tests.param_server.jobs import RUN, TOKEN, make_contract, make_layout, numbers

SERVER, W0, W1, STRANGER = Pair.new(), Pair.new(), Pair.new(), Pair.new()
NAMES = {W0.public: "w0", W1.public: "w1"}
SERVING = Keys(mine=SERVER, server=SERVER.public, serving=SERVER.secret, names=NAMES)
CONTRACT = make_contract(make_layout(("w", (10, 13), 0), ("b", (7,), 0)), SGD())


@pytest.fixture(scope="module", autouse=True)
def _collector():
    start_collector()


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


def of(pair: Pair, server: Pair = SERVER) -> Keys:
    return Keys(mine=pair, server=server.public)


def serving(names) -> Keys:
    return Keys(mine=SERVER, server=SERVER.public, serving=SERVER.secret, names=names)


@contextlib.contextmanager
def is_told(context, endpoint, keys: Keys | None):
    """A client that has said something."""
    with contextlib.closing(ZmqClient(context, keys)) as client:
        client.connect(0, endpoint)
        client.send(0, [b"hello", b"x" * 100_000])
        yield client


def test_who_is_listed_is_let_in_and_every_message_says_who_it_is(context):
    with contextlib.closing(ZmqServer(context, keys=SERVING)) as server:
        for pair, name in ((W0, "w0"), (W1, "w1"), (W0, "w0")):
            with is_told(context, server.endpoint, of(pair)) as client:
                received = server.recv(5.0)
                assert received is not None
                peer, frames = received
                assert [len(frame) for frame in frames] == [5, 100_000]
                assert server.speaker == name
                server.send(peer, [b"welcome", bytes(100_000)])
                answer = client.recv(5.0)
                assert answer is not None
                assert [len(frame) for frame in answer[1]] == [7, 100_000]


@pytest.mark.parametrize(
    "keys",
    [of(STRANGER), None, of(W0, STRANGER)],
    ids=["an unlisted key", "no key", "another server's key"],
)
def test_nobody_else_is_let_in(context, keys):
    with (
        contextlib.closing(ZmqServer(context, keys=SERVING)) as server,
        is_told(context, server.endpoint, keys) as client,
    ):
        assert knock(context, server.endpoint, keys) != zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert server.recv(0.3) is None
        assert client.recv(0.0) is None  # and it is not told of a cut again and again
        assert knock(context, server.endpoint, of(W0)) == zmq.EVENT_HANDSHAKE_SUCCEEDED


def test_a_client_says_once_why_it_is_not_let_in(context, caplog):
    with (
        contextlib.closing(ZmqServer(context, keys=SERVING)) as server,
        is_told(context, server.endpoint, of(STRANGER)) as client,
    ):
        assert client.recv(0.5) is None  # it tries several times
        assert caplog.text.count(f"{server.endpoint} does not know our key") == 1


def test_a_server_names_the_keys_that_it_refuses_without_a_flood(context, caplog):
    with contextlib.closing(ZmqServer(context, keys=SERVING)) as server:
        assert "is not listed" not in caplog.text  # the test at the start is no news
        for _ in range(9):
            knock(context, server.endpoint, of(STRANGER))
        said = [record.getMessage() for record in caplog.records]
        assert [text.partition("refused=")[2] for text in said] == ["1", "2", "4", "8"]
        assert all(STRANGER.public in text for text in said)


def test_with_a_dead_authenticator_nobody_is_let_in(context):
    with contextlib.closing(ZmqServer(context, keys=SERVING)) as server:
        assert server._doorkeeper is not None
        server._doorkeeper.authenticator.stop()
        for keys in (of(STRANGER), of(W0)):
            assert knock(context, server.endpoint, keys) != zmq.EVENT_HANDSHAKE_SUCCEEDED
            with is_told(context, server.endpoint, keys):
                assert server.recv(0.2) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nor_where_the_thread_has_died_of_something(context, monkeypatch):
    """Its socket is there still, and nobody answers."""
    with contextlib.closing(ZmqServer(context, keys=SERVING)) as server:

        async def die(self, msg):
            raise MemoryError

        monkeypatch.setattr(curve._Authenticator, "handle_zap_message", die)
        monkeypatch.setattr(curve, "SELF_TEST_S", 0.5)
        for keys in (of(STRANGER), of(W0)):
            assert knock(context, server.endpoint, keys) != zmq.EVENT_HANDSHAKE_SUCCEEDED
            with is_told(context, server.endpoint, keys):
                assert server.recv(0.2) is None
        assert server._doorkeeper is not None
        assert not server._doorkeeper.authenticator.is_alive()


class Broken(dict[str, str]):
    """A list of names that cannot be read any more."""

    def get(self, *_):
        raise OSError("the list is gone")


def test_a_list_that_raises_lets_nobody_in_and_does_not_end_the_thread(context, caplog):
    with contextlib.closing(ZmqServer(context, keys=serving(Broken(NAMES)))) as server:
        for _ in range(3):
            event = knock(context, server.endpoint, of(W0))
            assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        assert server._doorkeeper is not None
        assert server._doorkeeper.authenticator.is_alive()
        assert "the list is gone" in caplog.text


def test_a_server_that_would_let_strangers_in_does_not_serve(context, monkeypatch):
    """What pyzmq would do with a list that takes everybody: the test at the start must find it."""

    class Everybody(dict[str, str]):
        def get(self, *_):
            return "w0"

    with pytest.raises(DoorkeeperFailed, match="did not refuse a key that is not listed"):
        ZmqServer(context, keys=serving(Everybody()))


def test_without_the_domain_strangers_come_in_and_the_test_at_the_start_finds_it(
    context, monkeypatch
):
    """The trap itself: CURVE with neither a domain nor a thread takes every key."""

    def watch_(self, sock):
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, SERVER.secret.encode())

    monkeypatch.setattr(Doorkeeper, "watch_", watch_)
    monkeypatch.setattr(curve._Authenticator, "start", lambda self: None)
    with pytest.raises(DoorkeeperFailed, match=f"event {int(zmq.EVENT_HANDSHAKE_SUCCEEDED)}"):
        ZmqServer(context, keys=SERVING)


def test_an_old_libzmq_is_not_trusted_with_keys(context, monkeypatch):
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(DoorkeeperFailed, match=r"older than 4\.3\.5"):
        ZmqServer(context, keys=SERVING)


def test_without_keys_everybody_is_let_in_and_nobody_known(context):
    with (
        contextlib.closing(ZmqServer(context)) as server,
        is_told(context, server.endpoint, None),
    ):
        assert server.recv(5.0) is not None
        assert server.speaker is None


def test_a_pair_is_found_again_by_its_secret_and_shows_none():
    assert Pair.of(str.__str__(SERVER.secret)) == SERVER
    assert SERVER.secret.encode().decode() not in repr(SERVING)
    assert Keys.from_dict(SERVING.to_dict()) == SERVING
    for wrong in ("", "x" * 39, "\0" * 40, "ü" * 40, SERVER.secret + "x"):
        with pytest.raises(ValueError, match="not a key") as caught:
            Pair.of(wrong)
        assert not wrong or wrong not in str(caught.value)


@contextlib.contextmanager
def shard() -> Iterator[tuple[Shard, str]]:
    """A shard that is served by a thread, behind keys."""
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stop = threading.Event()
    transport = ZmqServer(made, keys=serving(MappingProxyType(NAMES)))
    server = ShardServer(Shard(ShardConfig(run=RUN, token=TOKEN)), transport)
    thread = threading.Thread(target=server.serve, args=(stop.is_set,))
    thread.start()
    try:
        yield server.shard, transport.endpoint
    finally:
        stop.set()
        thread.join(30)
        transport.close()
        made.term()


@contextlib.contextmanager
def worker(endpoint: str, w: str, pair: Pair) -> Iterator[Client]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(made, of(pair)),
        [endpoint],
        Identity(run=RUN, w=w, inc=1, token=TOKEN),
        CONTRACT,
        Patience(retry_s=10.0, give_up_s=20.0),
    )
    try:
        yield client
    finally:
        client.close()
        made.term()


def test_a_worker_trains_over_encrypted_connections():
    with shard() as (_, endpoint), worker(endpoint, "w0", W0) as client:
        client.connect()
        client.initialise(numbers(client.layout))
        copy = Fetched(client.layout)
        client.fetch(copy)
        absent = (b"",) * len(client.layout.parts)
        for _ in range(3):
            ticket = client.start_push(numbers(client.layout, 1), 1, copy, absent, copy)
            client.wait(ticket)
            assert set(ticket.pushed.statuses) == {"applied"}
        assert ticket.pushed.version == 3


def test_a_worker_that_says_it_is_another_is_refused():
    with shard() as (served, endpoint), worker(endpoint, "w1", W0) as client:
        with pytest.raises(Refused, match="by the key of w0, and its message says w1") as caught:
            client.connect()
        assert caught.value.code == "key"
        assert served.counts["key"] == 1
        assert "w1" not in served._incarnations


def test_a_worker_that_was_let_in_cannot_go_on_under_another_name():
    with shard() as (served, endpoint), worker(endpoint, "w0", W0) as client:
        client.connect()
        client.identity = Identity(run=RUN, w="w1", inc=1, token=TOKEN)
        with pytest.raises(Refused, match="by the key of w0"):
            client.initialise(numbers(client.layout))
        assert not served.is_ready
