"""Between hosts: Downpour against gloo's all-reduce, on two hosts with a slow link between them.

    sudo python tests/bench/between.py [--mbit 1000 100] [--delay-ms 0 10] [--windows 3]

The hosts are network namespaces (tests/cluster/hosts.py), each of which lets so many megabits a
second through, in and out. With --delay-ms their frames pass a process that keeps each for so long,
one way (tests/bench/slow_switch.py).

Each host has a worker; with ours, also one of two shards. The work is that of `distbelief bench
wire`: a gradient of 28 MB a round, no compute. By all-reduce, and by ours as float32, each host
sends and takes 28 MB a round. Systems are alive together, and take turns. All-reduce is
synchronous; ours is not, so its rounds are the mean of both workers'. Needs root and iproute2,
exits with 2 without.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq
from torch._C._distributed_c10d import TCPStore

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from distbelief.bench.work import Work, apply_  # noqa: E402 - from this tree
from distbelief.param_server.client import Client, Fetched  # noqa: E402
from distbelief.param_server.compress import Compression  # noqa: E402
from distbelief.param_server.identity import Identity  # noqa: E402
from distbelief.param_server.server import ShardServer, SnapshotConfig  # noqa: E402
from distbelief.param_server.shard import Shard, ShardConfig  # noqa: E402
from distbelief.param_server.transport import ZmqClient, ZmqServer, keep_freed_memory  # noqa: E402
from tests.bench.slow_switch import DEVICE, slow_link  # noqa: E402
from tests.cluster.hosts import Hosts, missing  # noqa: E402

RUN = "between"
FORMS = ("float32", "bfloat16", "int8")
GLOO = "gloo all-reduce"
HOSTS = (1, 2)
END_S = 10.0

Spec = Mapping[str, Any]  # Any: JSON


def serve(spec: Spec) -> None:
    """Be a shard of one form until the input ends."""
    config = ShardConfig(
        run=RUN, token=spec["token"], index=spec["index"], num_shards=2, num_workers=2
    )
    transport = ZmqServer(zmq.Context(), spec["address"])
    server = ShardServer(Shard(config), transport, None, SnapshotConfig())
    _say(endpoint=transport.endpoint)
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    server.serve(lambda: bool(poller.poll(0)))


def work(spec: Spec) -> None:
    """Be a worker of one form."""
    made = Work.of()
    client = Client(
        ZmqClient(zmq.Context()),
        spec["endpoints"],
        Identity(run=RUN, w=f"w{spec['index']}", inc=1, token=spec["token"]),
        made.contract,
        compression=Compression(push=spec["form"], fetch=spec["form"]),
    )
    client.connect()
    if spec["index"] == 0:
        client.initialise(torch.zeros(made.size))
    copy, grad = Fetched(client.layout), torch.ones(made.size)
    absent = client.layout.absent_masks(())
    _say(is_ready=True)
    sys.stdin.readline()
    client.fetch(copy)
    _say(is_ready=True)
    for line in sys.stdin:
        began, rounds = time.monotonic(), 0
        while time.monotonic() - began < float(line):
            client.wait(client.start_push(grad, 1, copy, absent, copy))
            rounds += 1
        _say(rate=rounds / (time.monotonic() - began))
    client.close()


def reduce(spec: Spec) -> None:
    """Be a worker of gloo's."""
    os.environ["GLOO_SOCKET_IFNAME"] = spec["device"]
    made = Work.of()
    store = TCPStore(spec["store"], spec["port"], 2, spec["index"] == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=spec["index"], world_size=2)
    grad = torch.ones(made.size)
    values, momentum = torch.zeros(made.size), torch.zeros(made.size)
    _say(is_ready=True)
    sys.stdin.readline()
    _say(is_ready=True)
    wants = torch.zeros(1)
    for line in sys.stdin:
        began, rounds = time.monotonic(), 0
        while True:
            dist.all_reduce(grad)
            grad.div_(2)  # 1 again
            apply_(values, grad, momentum)
            rounds += 1
            wants[0] = float(time.monotonic() - began < float(line))
            dist.all_reduce(wants)
            if float(wants[0]) < 2:
                break
        _say(rate=rounds / (time.monotonic() - began))
    dist.destroy_process_group()


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


class Member:
    """A process of this file on a host, and the lines to and from it."""

    def __init__(self, hosts: Hosts, number: int, role: str, **spec: object) -> None:
        command = (sys.executable, __file__, "--be", role)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process: Any = hosts.popen(number, *command, **pipes)  # Any: its pipes are there
        self.tell(json.dumps(spec))

    def tell(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> Spec:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with exit code {self._process.wait()}")
        heard: Spec = json.loads(line)
        return heard

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def team(hosts: Hosts, addresses: Mapping[int, str], system: str, stack: ExitStack) -> list[Member]:
    """The two workers of a system, ready; its shards as well."""
    token = secrets.token_hex(16)  # it goes by a pipe and nowhere else

    def begin(number: int, role: str, **spec: object) -> Member:
        member = Member(hosts, number, role, index=number - 1, token=token, **spec)
        stack.callback(member.close)
        return member

    if system == GLOO:
        is_slow = addresses[1] != hosts[1].address
        where = {"store": addresses[1], "port": 29500, "device": DEVICE if is_slow else "eth0"}
        workers = [begin(number, "gloo", **where) for number in HOSTS]
    else:
        shards = [begin(number, "shard", address=addresses[number]) for number in HOSTS]
        endpoints = [shard.hear()["endpoint"] for shard in shards]
        workers = [begin(number, "worker", form=system, endpoints=endpoints) for number in HOSTS]
    for step in range(2):
        for worker in workers:
            worker.hear()
            if not step:
                worker.tell("go")
    return workers


@contextmanager
def linked(mbit: int, delay_ms: float, folder: Path) -> Iterator[tuple[Hosts, dict[int, str]]]:
    """Two hosts, and the addresses at which they reach each other."""
    with Hosts.up(2, folder / "hosts") as hosts, ExitStack() as stack:
        addresses = {number: hosts[number].address for number in HOSTS}
        if delay_ms:
            pids = {number: hosts[number].pid for number in HOSTS}
            addresses = stack.enter_context(slow_link(pids, delay_ms, mbit))
        else:
            for number in HOSTS:
                hosts.rate(number, mbit)
        yield hosts, addresses


def measure(
    mbit: int, delay_ms: float, systems: Sequence[str], windows: int, seconds: float, folder: Path
) -> dict[str, list[float]]:
    """Rounds a second of each system, window by window."""
    rates: dict[str, list[float]] = {system: [] for system in systems}
    with linked(mbit, delay_ms, folder) as (hosts, addresses), ExitStack() as stack:
        teams = {system: team(hosts, addresses, system, stack) for system in systems}
        for turn in range(windows):
            for system in systems if turn % 2 == 0 else reversed(systems):
                for worker in teams[system]:
                    worker.tell(str(seconds))
                heard = [worker.hear()["rate"] for worker in teams[system]]
                rates[system].append(statistics.mean(heard))
    return rates


def table(mbit: int, delay_ms: float, rates: Mapping[str, list[float]]) -> None:
    base = rates[GLOO]
    for system, found in rates.items():
        ratio = statistics.median(one / other for one, other in zip(found, base, strict=True))
        spread = f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"
        print(f"| {mbit} | {delay_ms:g} | {system} | {spread} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mbit", type=int, nargs="+", default=[1000, 100])
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0.0, 10.0])
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.0, help="0: six rounds of all-reduce")
    parser.add_argument("--be", choices=("shard", "worker", "gloo"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be:
        keep_freed_memory()
        torch.set_num_threads(1)
        spec = json.loads(sys.stdin.readline())
        {"shard": serve, "worker": work, "gloo": reduce}[args.be](spec)
        return
    if why := missing():
        print(f"no hosts: {why}", file=sys.stderr)
        raise SystemExit(2)
    print("| Mbit/s | ms one way | system | rounds/s | x all-reduce |\n|---|---|---|---|---|")
    for delay_ms in args.delay_ms:
        for mbit in args.mbit:
            seconds = args.seconds or max(3.0, 6 * 28e6 * 8 / (mbit * 1e6))
            with tempfile.TemporaryDirectory() as folder:
                found = measure(mbit, delay_ms, (GLOO, *FORMS), args.windows, seconds, Path(folder))
            table(mbit, delay_ms, found)


if __name__ == "__main__":
    main()
