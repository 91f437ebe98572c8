"""Real shards over real ZeroMQ on loopback, served by threads of the test's process."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import zmq

from distbelief.param_server.client import Client
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Application, Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import ZmqClient, ZmqServer

RUN, TOKEN = "test-run", "test-token"


class Cluster:
    """Shards with their endpoints; `logs[i]` are the applications of shard i in their order."""

    run, token = RUN, TOKEN

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.context = context
        self.shards: list[Shard] = []
        self.endpoints: list[str] = []
        self.logs: list[list[Application]] = []

    def client(self, w: str, contract: Contract | None, inc: int = 1) -> Client:
        """A client that is not connected yet; whoever takes it closes it."""
        identity = Identity(run=RUN, w=w, inc=inc, token=TOKEN)
        return Client(ZmqClient(self.context), self.endpoints, identity, contract)


@contextmanager
def cluster(
    num_shards: int,
    num_workers: int = 1,
    folder: Path | None = None,
    epoch: int = 1,
) -> Iterator[Cluster]:
    """Serve a job's shards; with a folder they restore from it and save into it at the end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Cluster(context)
    halt = threading.Event()
    threads: list[threading.Thread] = []
    transports: list[ZmqServer] = []
    try:
        for index in range(num_shards):
            config = ShardConfig(
                run=RUN,
                token=TOKEN,
                index=index,
                num_shards=num_shards,
                num_workers=num_workers,
                epoch=epoch,
            )
            store = None if folder is None else SnapshotStore(folder / f"shard{index}")
            found = None if store is None else store.latest()
            log: list[Application] = []
            shard = Shard(config, None if found is None else found[0], log.append)
            transport = ZmqServer(context)
            server = ShardServer(shard, transport, store, SnapshotConfig(every_s=0.0))
            made.shards.append(shard)
            made.endpoints.append(transport.endpoint)
            made.logs.append(log)
            transports.append(transport)
            threads.append(threading.Thread(target=server.serve, args=(halt.is_set,)))
        for thread in threads:
            thread.start()
        yield made
    finally:
        halt.set()
        for thread in threads:
            thread.join(30)
        for transport in transports:
            transport.close()
        context.term()


def in_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all at once and wait; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
