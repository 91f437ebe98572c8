"""Shaped: what compression brings on a slow link, between two network namespaces made for it.

    sudo python tests/bench/shaped.py [--mbit 1000] [--windows 5] [--seconds 4]

A shard in one namespace, a worker for each form in the other, a pair of virtual interfaces between
them, each of which lets through so many megabits a second (tc's token bucket). The work is that of
`distbelief bench wire`; the forms take turns. In the end all parameters must be what that number
of pushes gives. Needs root and iproute2; exits with 2 where they are missing, with 1 if a result
is wrong. The namespaces are gone afterwards, and no traffic leaves them.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import zmq

from distbelief.bench.window import Spread, ratios
from distbelief.bench.work import Course, Work
from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.compress import Compression
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.transport import ZmqClient, ZmqServer, keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
RUN = "shaped"
FORMS = ("float32", "bfloat16", "int8")
SERVER, WORKER = "10.213.7.1", "10.213.7.2"
"""Addresses inside the namespaces: nobody else sees them."""
END_S = 10.0

Spec = Mapping[str, Any]  # Any: JSON


def serve(spec: Spec) -> None:
    """Be the shard until the driver hangs up."""
    config = ShardConfig(run=RUN, token=spec["token"], num_workers=len(FORMS))
    transport = ZmqServer(zmq.Context(), SERVER)
    server = ShardServer(Shard(config), transport, None, SnapshotConfig())
    _say(endpoint=transport.endpoint)
    parent = os.getppid()
    server.serve(lambda: os.getppid() != parent)


def work(spec: Spec) -> None:
    """Be a worker: run for as long as each line says, and end with the input."""
    made = Work.of()
    compression = Compression(push=spec["form"], fetch=spec["form"])
    identity = Identity(run=RUN, w=spec["form"], inc=1, token=spec["token"])
    client = Client(
        ZmqClient(zmq.Context()),
        [spec["endpoint"]],
        identity,
        made.contract,
        compression=compression,
    )
    client.connect()
    client.initialise(torch.zeros(made.size))
    copy, grad = Fetched(client.layout), torch.ones(made.size)
    absent = client.layout.absent_masks(())
    client.fetch(copy)
    _say(is_ready=True)
    for line in sys.stdin:
        began, rounds = time.monotonic(), 0
        while time.monotonic() - began < float(line):
            client.wait(client.start_push(grad, 1, copy, absent, copy))
            rounds += 1
        seconds = time.monotonic() - began
        client.fetch(copy)
        low, high = map(float, copy.values.aminmax())
        _say(rounds=rounds, seconds=seconds, versions=sorted(set(copy.version)), low=low, high=high)
    client.close()


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


class Member:
    """A process of this file in a namespace, and the lines to and from it."""

    def __init__(self, namespace: str, role: str, **spec: object) -> None:
        words = ["ip", "netns", "exec", namespace, sys.executable, __file__, "--be", role]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.tell(json.dumps(spec))

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def hear(self) -> Spec:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with exit code {self._process.wait()}")
        heard: Spec = json.loads(line)
        return heard

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def link(mbit: int) -> Iterator[tuple[str, str]]:
    """Two namespaces with a link of that speed; their names."""
    here = os.getpid()
    one, two = f"db-shard-{here}", f"db-worker-{here}"
    shape = ["tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms"]
    with ExitStack() as stack:
        for name in (one, two):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        _ip("-n", one, "link", "add", "db0", "type", "veth", "peer", "name", "db0", "netns", two)
        for name, address in ((one, SERVER), (two, WORKER)):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "db0")
            _ip("-n", name, "link", "set", "db0", "up")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "db0", "root", *shape)
        yield one, two


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        _give_up(f"{words[0]} is missing: install iproute2")
    except subprocess.CalledProcessError as error:
        _give_up(f"`{' '.join(words)}` failed: {error.stderr.strip()}")


def _give_up(why: str) -> None:
    print(f"cannot make network namespaces here: {why} (it needs root)", file=sys.stderr)
    raise SystemExit(2)


def measure(mbit: int, windows: int, seconds: float) -> bool:
    """Print the table; the result is right."""
    token = secrets.token_hex(16)  # it goes by a pipe and nowhere else
    rates: dict[str, list[float]] = {form: [] for form in FORMS}
    heard: Spec = {}
    pushes = 0
    with link(mbit) as (one, two), ExitStack() as stack:
        shard = Member(one, "shard", token=token)
        stack.callback(shard.close)
        endpoint = shard.hear()["endpoint"]
        workers = {}
        for form in FORMS:
            workers[form] = Member(two, "worker", token=token, form=form, endpoint=endpoint)
            stack.callback(workers[form].close)
            workers[form].hear()
        for turn in range(windows):
            for form in FORMS if turn % 2 == 0 else reversed(FORMS):
                workers[form].tell(str(seconds))
                heard = workers[form].hear()
                pushes += heard["rounds"]
                rates[form].append(heard["rounds"] / heard["seconds"])
        workers["float32"].tell("0")  # fetches alone, and not rounded
        heard = workers["float32"].hear()
    want = Course().after(pushes)
    is_right = (heard["versions"], heard["low"], heard["high"]) == ([pushes], want, want)
    _table(mbit, rates)
    verdict = "right" if is_right else f"wrong: {heard}, expected {want}"
    print(f"after {pushes} pushes the parameters are {verdict}")
    return is_right


def _table(mbit: int, rates: Mapping[str, list[float]]) -> None:
    rows = []
    for form, found in rates.items():
        rounds, ratio = Spread.of(found), ratios(found, rates["float32"])
        assert ratio is not None
        rows.append((form, rounds, ratio))
    print(f"{mbit} Mbit/s each way, 56.0 MB a round as float32")
    print("| form | rounds/s | x float32 |\n|---|---|---|")
    for form, rounds, ratio in rows:
        print(
            f"| {form} | {rounds.median:.2f} ({rounds.low:.2f}-{rounds.high:.2f}) | "
            f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--be", choices=("shard", "worker"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.be:
        raise SystemExit(not measure(args.mbit, args.windows, args.seconds))
    keep_freed_memory()
    torch.set_num_threads(1)
    spec = json.loads(sys.stdin.readline())
    (serve if args.be == "shard" else work)(spec)


if __name__ == "__main__":
    main()
