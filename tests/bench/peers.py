"""Peers: this system against others that do the same work, all in turns, in one table.

    python tests/bench/peers.py [--workers 1 2] [--shards 1] [--windows 5] [--json FILE]

The work is that of `distbelief bench wire`: GoogLeNet's 116 tensors, push, momentum SGD, fetch.
The others are Ray's documented parameter server, torch.distributed.rpc, gloo's all-reduce (which
is synchronous), and servers written by hand. What each system computes is checked: after a count
of pushes that is known, all parameters must be within half a push of what torch.optim.SGD gives.
Exits with 1 if a result is wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from distbelief.bench.gloo import GLOO
from distbelief.bench.ours import NAME
from distbelief.bench.system import System
from distbelief.bench.table import Column, show, spread
from distbelief.bench.wire import Row, WireConfig, columns, wire
from distbelief.problem import Problem

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Of Ray, before it is imported: its processes then speak over the loopback alone. Without it a
`_node_ip_address` of 127.0.0.1 is turned into the host's own address."""


def _ray() -> Sequence[System]:
    from tests.bench.peer_ray import RAY

    return (RAY,)


def _rpc() -> Sequence[System]:
    from tests.bench.peer_rpc import RPC, RPC_TCP

    return (RPC, RPC_TCP)


PEERS: dict[str, Callable[[], Sequence[System]]] = {
    "gloo": lambda: (GLOO,),
    "rpc": _rpc,
    "ray": _ray,
}
"""By name; each loads its library only when it is asked for."""


def measure(
    names: Sequence[str],
    workers: Sequence[int],
    shards: Sequence[int],
    *,
    size: int | None,
    seconds: float,
    windows: int,
    with_floors: bool = True,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Ours and the peers of these names. Raises: Problem if a process fails."""
    rows = []
    for num_shards in shards:
        # An all-reduce has no servers: it stands with those of one.
        systems = [
            system
            for name in names
            if name != "gloo" or num_shards == 1
            for system in PEERS[name]()
        ]
        config = WireConfig(
            workers=workers,
            shards=(num_shards,),
            size=size,
            seconds=seconds,
            windows=windows,
            with_floors=with_floors,
            peers=systems,
            env={"PYTHONPATH": str(ROOT), **LOOPBACK},  # the path is for the roles in this folder
        )
        rows += wire(config, on_progress)
    return rows


def ours_to(rows: Sequence[Row], transport: str) -> Column[Row]:
    """How many times as fast as the row ours is, over this transport."""

    def cell(row: Row) -> str:
        for mine in rows:
            if (mine.system, mine.transport) == (NAME, transport) and (
                (mine.workers, mine.shards) == (row.workers, row.shards)
            ):
                found = mine.ratios.get(row.label)
                return "-" if found is None else spread(found.median, found.low, found.high, 2)
        return "-"

    return Column(f"ours {transport} to it", cell)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--shards", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--size", type=int, metavar="PARAMS")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--windows", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args(argv)
    if min(*args.workers, *args.shards, args.windows) < 1 or args.seconds <= 0:
        parser.error("--workers, --shards, --windows and --seconds must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        rows = measure(
            args.peers,
            args.workers,
            args.shards,
            size=args.size,
            seconds=args.seconds,
            windows=args.windows,
            on_progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        return 130
    except Problem as problem:
        print(problem.text, file=sys.stderr)
        return problem.exit_code
    title = f"{rows[0].size:,} parameters, medians of {args.windows} windows of {args.seconds:g} s"
    mine = [ours_to(rows, "shm"), ours_to(rows, "tcp")]
    first, last = columns(rows)[:4], columns(rows)[4:]
    show(title, [*first, *mine, *(c for c in last if not c.head.startswith("x "))], rows)
    if args.json is not None:
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        args.json.write_text(text, encoding="utf-8")
    wrong = [f"{row.label}: {row.why}" for row in rows if row.check != "right"]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for tests.bench
    sys.exit(main())
