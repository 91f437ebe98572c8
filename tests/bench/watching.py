"""What it costs to be watched: GoogLeNet by 4 workers with the monitor and without, in turns; and
one run in which the monitor stands still for every other stretch of some seconds, and one in which
it is killed at the beginning of every other, longer one.

    python tests/bench/watching.py [--turns 4] [--seconds 40] [--pauses 30] [--kills 5]
        [--sleeping] [--json]

With --sleeping a step takes a fixed time in which the processors are free (`sleeper`), as on a GPU:
the rate then does not follow the machine's speed, so that 1 % can be told.

A viewer reads the stream of the first runs all the time. A rate is that of the controller's own
count, after the start. Each ratio is of neighbours in time: of a stretch to the mean of the ones
before and after it, of a run to the one beside it. Told are the medians. 1.0 is no difference.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.cookiejar import CookieJar
from pathlib import Path

FLEET = (
    *("--engine", "local", "--workers", "4", "--shards", "2"),
    # Small batches: a rate is a count of them, and stretches are short.
    *("--data", "digits", "--batch-size", "4"),
    # Slow enough to learn nothing and never to diverge: what it costs is asked.
    *("--set", "train.lr=1e-5", "--set", "train.momentum=0.0"),
)
COMPUTING = ("--model", "googlenet", "--set", "data.image_size=64")
SLEEPING = ("--model", "sleeper:Sleeper")
START_TIMEOUT_S = 90.0
WARM_S = 8.0


def start(parent: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "distbelief", "launch", *FLEET, *more]
    command += ["--run-dir", str(parent), "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


def result_of(run: "subprocess.Popen[bytes]") -> dict[str, object]:
    """Raises: CalledProcessError if it fails."""
    out, _ = run.communicate()
    if run.returncode not in (0, 130):
        raise subprocess.CalledProcessError(run.returncode, run.args)
    told: dict[str, object] = json.loads(out.decode().strip().splitlines()[-1])
    return told


def folder_of(parent: Path, name: str) -> Path:
    """Of the run that has just been started, once it has that file."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        for file in parent.glob(f"*/{name}"):
            return file.parent
        time.sleep(0.1)
    raise SystemExit(f"no {name} within {START_TIMEOUT_S:.0f} s")


class Viewer(threading.Thread):
    """Reads the stream as a page does, until it ends; again when it is cut."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._has_ended = threading.Event()
        self.num_bytes = 0

    def run(self) -> None:
        while not self._has_ended.is_set():
            with contextlib.suppress(OSError):
                jar = urllib.request.HTTPCookieProcessor(CookieJar())
                opener = urllib.request.build_opener(jar)
                opener.open(self._url, timeout=5).close()
                stream = self._url.partition("?")[0] + "api/v1/stream"
                with opener.open(stream, timeout=5) as answer:
                    while not self._has_ended.is_set() and (data := answer.read1(65536)):
                        self.num_bytes += len(data)
            self._has_ended.wait(0.5)

    def end(self) -> None:
        self._has_ended.set()


def rate(folder: Path, seconds: float) -> float:
    """Samples a second from now on, by the controller's own count and clock."""
    status = folder / "status.json"
    before = json.loads(status.read_text())
    time.sleep(seconds)
    after = json.loads(status.read_text())
    return float((after["samples"] - before["samples"]) / (after["at"] - before["at"]))


def warm(run: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait until it trains."""
    status = folder / "status.json"
    while run.poll() is None and not (
        status.exists() and json.loads(status.read_text())["samples"]
    ):
        time.sleep(0.2)
    time.sleep(WARM_S)


def samples_per_s(is_on: bool, job: Sequence[str], seconds: int, parent: Path) -> float:
    """Of one run."""
    parent.mkdir(parents=True)
    run = start(parent, *job, "--until", "1h", "--dashboard" if is_on else "--no-dashboard")
    viewer = None
    try:
        folder = folder_of(parent, "status.json")
        warm(run, folder)
        if is_on:
            viewer = Viewer(json.loads((folder / "monitor.json").read_text())["url"])
            viewer.start()
        found = rate(folder, seconds)
    finally:
        run.send_signal(signal.SIGINT)
        if viewer is not None:
            viewer.end()
        run.communicate()
    assert viewer is None or viewer.num_bytes, "nobody has seen anything"
    sys.stderr.write(f"{'on' if is_on else 'off'}: {found:.1f} samples/s\n")
    return found


def monitor_of(folder: Path) -> int:
    """Its pid, once it is back and has been there for a moment."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            pid = int(json.loads((folder / "monitor.json").read_text())["pid"])
            os.kill(pid, 0)
            time.sleep(1.0)
            return pid
        time.sleep(0.2)
    raise SystemExit(f"the monitor is not back within {START_TIMEOUT_S:.0f} s")


def kill(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGKILL)
    return lambda: None


def pause(pid: int) -> Callable[[], None]:
    os.kill(pid, signal.SIGSTOP)

    def go_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    return go_on


def stretches(
    do: Callable[[int], Callable[[], None]],
    job: Sequence[str],
    stretch_s: float,
    number: int,
    parent: Path,
) -> tuple[list[float], dict[str, object]]:
    """Ratios of a stretch in which something is done to the monitor to its neighbours' mean."""
    parent.mkdir(parents=True)
    run = start(parent, *job, "--until", "2h")
    folder = folder_of(parent, "monitor.json")
    warm(run, folder)
    ratios: list[float] = []
    try:
        quiet = rate(folder, stretch_s)
        for _ in range(number):
            undo = do(monitor_of(folder))
            changed = rate(folder, stretch_s)
            undo()
            monitor_of(folder)
            before, quiet = quiet, rate(folder, stretch_s)
            ratios.append(2 * changed / (before + quiet))
    finally:
        run.send_signal(signal.SIGINT)
    return ratios, result_of(run)


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=40)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--pauses", type=int, default=30)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--pause", type=float, default=5.0)
    parser.add_argument("--kill", type=float, default=30.0)
    parser.add_argument("--sleeping", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    parent = Path("runs") / f"watching-{time.strftime('%Y%m%d-%H%M%S')}"
    job = SLEEPING if args.sleeping else COMPUTING
    ratios: dict[str, list[float]] = {"on": []}
    for turn in range(args.turns):
        order = (True, False) if turn % 2 else (False, True)
        rates = {on: samples_per_s(on, job, args.seconds, parent / f"{turn}-{on}") for on in order}
        ratios["on"].append(rates[True] / rates[False])
    lost: dict[str, object] = {}
    for name, do, number, seconds in (
        ("paused", pause, args.pauses, args.pause),
        ("killed", kill, args.kills, args.kill),
    ):
        if number:
            found, result = stretches(do, job, seconds, number, parent / name)
            sys.stderr.write(f"{name}: {statistics.median(found):.3f}\n")
            ratios[name] = found
            lost[name] = {"accounting": result["accounting"], "refused": result["refused"]}
    told = {
        "type": "watching",
        "v": 1,
        **{name: round(statistics.median(found), 4) for name, found in ratios.items() if found},
        "ratios": {name: [round(ratio, 4) for ratio in found] for name, found in ratios.items()},
        "runs": lost,
    }
    sys.stdout.write(json.dumps(told, indent=None if args.json else 2) + "\n")


if __name__ == "__main__":
    main()
