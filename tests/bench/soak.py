"""Soak: a run that goes on for long must not grow: memory, open files, logs.

    .venv/bin/python tests/bench/soak.py                     30 minutes
    .venv/bin/python tests/bench/soak.py --seconds 600 --bound 4

Workers push whole numbers (distbelief/chaos/gradients.py) at an easy rate. Once a second the
resident memory and the open files of every process are looked at. The first fifth is for warming
up; through the rest a line is laid by least squares. The last line of the output is JSON, and the
exit code is 1 where a process grows by more than `--bound` MB an hour, opens files, is lost, or
where the logs take more than `--logs` MB in all.

Shared memory is told apart: a worker keeps its pushes there until a snapshot holds them, and a page
counts from the first time it was used. So it rises by a vector whenever one snapshot took longer
than all before, up to the 64 that a worker keeps at most. A line through that says nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distbelief.chaos import gradients

EVERY_S = 1.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
FDS_MAX = 2
"""Descriptors that a process may have more at the end: a snapshot that is being written."""


@dataclass(frozen=True, slots=True)
class Look:
    """One process at one moment."""

    at: float
    own: int
    """Bytes of resident memory that are not shared."""
    shared: int
    fds: int


def look(pid: int, now: float) -> Look | None:
    """None where the process is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        resident, shared = (int(n) * os.sysconf("SC_PAGE_SIZE") for n in pages[1:3])
        return Look(now, resident - shared, shared, len(os.listdir(f"/proc/{pid}/fd")))
    except (OSError, IndexError):
        return None


def slope_mb_h(looks: Sequence[Look]) -> float:
    """Growth of the memory of its own by least squares, in MB (10**6 bytes) an hour."""
    at = np.array([one.at for one in looks])
    own = np.array([one.own for one in looks], dtype=float)
    return float(np.polyfit(at - at[0], own, 1)[0]) * 3600 / 1e6


def pids_of(run: Path, launcher: int) -> dict[str, int]:
    """The launcher, what it has started by fork, and all that has reported."""
    found = {"launcher": launcher}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        command = Path(f"/proc/{child}/cmdline").read_text()
        if "distbelief.zygote" in command:
            found["zygote"] = child
    rows = json.loads((run / "processes.json").read_text())
    return {**found, **{row["name"]: row["pid"] for row in rows}}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def start(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distbelief", "launch", gradients.__file__]
    command += ["--engine", "local", "--workers", str(args.workers), "--shards", str(args.shards)]
    command += ["--run-dir", str(folder), "--set", "save.every_s=5"]
    command += ["--", str(args.values), str(args.pause)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def begun(folder: Path, processes: int) -> Path:
    """The run's folder, once all its processes have reported."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for file in folder.glob("*/processes.json"):
            if len(json.loads(file.read_text())) == processes:
                return file.parent
        time.sleep(0.2)
    raise SystemExit(f"the run did not begin within {START_TIMEOUT_S:.0f} s")


def soak(args: argparse.Namespace) -> dict[str, object]:
    """What has grown, and what is wrong."""
    looks: dict[str, list[Look]] = defaultdict(list)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="distbelief-soak-") as name:
        folder = Path(name)
        launcher = start(folder, args)
        try:
            run = begun(folder, args.workers + args.shards + 1)  # and the controller
            pids = pids_of(run, launcher.pid)
            began = time.monotonic()
            while (now := time.monotonic() - began) < args.seconds and launcher.poll() is None:
                for who, pid in pids.items():
                    seen = look(pid, now)
                    if seen is not None:
                        looks[who].append(seen)
                    elif who not in wrong:
                        wrong.append(who)
                time.sleep(EVERY_S)
            if pids_of(run, launcher.pid) != pids:
                wrong.append("processes were started again")
        finally:
            launcher.send_signal(signal.SIGINT)
            try:
                launcher.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
                wrong.append("the launcher did not end")
        result = json.loads((run / "result.json").read_text())
        logs, ledgers = size_of(run / "logs"), size_of(run / "snapshots")
    warm = {who: seen[len(seen) // 5 :] for who, seen in looks.items()}
    slopes = {who: round(slope_mb_h(seen), 3) for who, seen in warm.items() if len(seen) > 2}
    opened = {who: seen[-1].fds - seen[0].fds for who, seen in warm.items()}
    wrong += [f"{who} grows by {n} MB/h" for who, n in slopes.items() if n > args.bound]
    wrong += [f"{who} has {n} files more open" for who, n in opened.items() if n > FDS_MAX]
    if logs > args.logs * 1e6:
        wrong.append(f"the logs take {logs / 1e6:.1f} MB")
    return {
        "type": "soak",
        "v": 1,
        "seconds": round(max(seen[-1].at for seen in looks.values())),
        "updates": result["updates"],
        "exit": result["exit"],
        "slope_mb_per_h": slopes,
        "bound_mb_per_h": args.bound,
        "own_mb": {who: round(seen[-1].own / 1e6, 1) for who, seen in looks.items()},
        "own_spread_mb": {
            who: round((max(s.own for s in seen) - min(s.own for s in seen)) / 1e6, 2)
            for who, seen in warm.items()
        },
        "shared_mb": {who: round(seen[-1].shared / 1e6, 1) for who, seen in looks.items()},
        "shared_grown_mb": {
            who: round((seen[-1].shared - seen[0].shared) / 1e6, 2) for who, seen in warm.items()
        },
        "fds_opened": opened,
        "logs_bytes": logs,
        "snapshots_bytes": ledgers,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a long run for growth.")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--values", type=int, default=200_000, help="values of the vector")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two pushes")
    parser.add_argument("--bound", type=float, default=8.0, help="MB an hour, of each process")
    parser.add_argument("--logs", type=float, default=16.0, help="MB of logs in all")
    found = soak(parser.parse_args())
    print(json.dumps(found))
    sys.exit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
