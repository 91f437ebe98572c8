"""A run to look at: a Store that a short simulation has filled, and what serves it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from distbelief.chronicle import Event
from distbelief.monitor.access import Access
from distbelief.monitor.api import Api
from distbelief.monitor.http import Server
from distbelief.monitor.pages import Pages
from distbelief.monitor.simulate import START_AT, Simulation
from distbelief.monitor.store import Store
from distbelief.monitor.stream import Stream

SECRET = "0123456789abcdef"


class Watched:
    """A store and its stream, second by second."""

    def __init__(self, num_workers=4, seconds=20, **options):
        self.store = Store(actions=bool(options.pop("actions", False)))
        self.simulation = Simulation(num_workers, 2, seed=1, **options)
        self.second = 0
        self.stream = Stream(self.store)
        for _ in range(seconds):
            self.go_on()

    @property
    def now(self):
        return START_AT + self.second

    def go_on(self):
        """One more second."""
        self.second += 1
        for message in self.simulation.until(float(self.second)):
            self.store.take(message, message.at)
        self.store.advance(self.now)
        self.stream.publish_tick(self.now)

    def happen(self, text="something", kind="state", who=""):
        self.store.take(Event(at=self.now, kind=kind, who=who, text=text), self.now)
        self.stream.publish(self.now)


@dataclass
class Site:
    """A real server on the loopback."""

    watched: Watched
    server: Server
    url: str
    port: int
    session: aiohttp.ClientSession

    def go_on(self):
        self.watched.go_on()
        self.server.wake()

    @property
    def buffered(self):
        """Bytes that the server keeps for its one reader."""
        runner = self.server._runner
        assert runner is not None
        assert runner.server is not None
        (connection,) = runner.server.connections
        assert connection.transport is not None
        return connection.transport.get_write_buffer_size()

    def tell(self, size):
        """A tick of a made-up size."""
        seq = self.watched.stream.ring.newest + 1
        self.watched.stream._add("tick", seq, self.watched.now, {"seq": seq, "x": "x" * size})
        self.server.wake()

    async def get(self, path, *, token=SECRET, **headers):
        """(status, headers, body)"""
        sent = {"X-DB-Token": token, "Accept-Encoding": "identity"}
        sent |= {k.replace("_", "-"): v for k, v in headers.items()}
        sent = {k: v for k, v in sent.items() if v}
        async with self.session.get(self.url + path, headers=sent, allow_redirects=False) as r:
            return r.status, r.headers, await r.read()


@asynccontextmanager
async def site(
    watched=None, *, folder=None, actions=False, root_path="", secret=SECRET, pages=None, **options
) -> AsyncIterator[Site]:
    watched = watched or Watched()
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    api = Api(watched.store, watched.stream, folder, actions=actions, **options)
    server = Server(api, Access(secret, port=port), pages or Pages(), root_path)
    await server.start(sock)
    try:
        # Without decompression, so that a test sees what was sent.
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield Site(watched, server, f"http://127.0.0.1:{port}", port, session)
    finally:
        watched.stream.end("stopped", watched.now)
        await server.close()


async def messages(response, count):
    """The next server-sent events: (id, kind, data)."""
    found = []
    async with asyncio.timeout(10):
        block: dict[str, str] = {}
        async for raw in response.content:
            line = raw.decode().rstrip("\n")
            if line:
                name, _, value = line.partition(": ")
                block[name] = value
            elif "event" in block:
                found.append((block.get("id"), block["event"], block["data"]))
                block = {}
                if len(found) == count:
                    return found
            else:
                block = {}
    return found
