"""What it costs to be watched: GoogLeNet by 4 workers with the monitor and without, in turns; and
one run in which the monitor is killed, or stands still, for every other stretch of some seconds.

    python tests/bench/watching.py [--seconds 60] [--turns 5] [--stretch 6] [--json]

A viewer reads the stream all the time. Each ratio is of neighbours in time; told are the medians,
and how many there were. 1.0 is no difference.
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
from collections.abc import Callable
from http.cookiejar import CookieJar
from pathlib import Path

JOB = (
    *("--engine", "local", "--workers", "4", "--shards", "2"),
    *("--model", "googlenet", "--data", "digits", "--batch-size", "16"),
    # Slow enough to learn nothing and never to diverge: what it costs is asked.
    *("--set", "data.image_size=64", "--set", "train.lr=1e-5", "--set", "train.momentum=0.0"),
)
START_TIMEOUT_S = 90.0
WARM_S = 8.0


def start(parent: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "distbelief", "launch", *JOB, *more]
    command += ["--run-dir", str(parent), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


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


def samples_per_s(is_on: bool, seconds: int, parent: Path) -> float:
    """Of one run."""
    parent.mkdir(parents=True)
    run = start(parent, "--until", f"{seconds}s", "--dashboard" if is_on else "--no-dashboard")
    viewer = None
    if is_on:
        told = json.loads((folder_of(parent, "monitor.json") / "monitor.json").read_text())
        viewer = Viewer(told["url"])
        viewer.start()
    result = result_of(run)
    if viewer is not None:
        viewer.end()
        assert viewer.num_bytes, "nobody has seen anything"
    rate = float(str(result["samples_per_s"]))
    sys.stderr.write(f"{'on' if is_on else 'off'}: {rate} samples/s\n")
    return rate


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
    do: Callable[[int], Callable[[], None]], stretch_s: float, number: int, parent: Path
) -> tuple[list[float], dict[str, object]]:
    """Ratios of a stretch in which something is done to the monitor to the one before it."""
    parent.mkdir(parents=True)
    run = start(parent, "--until", "2h")
    folder = folder_of(parent, "monitor.json")
    status = folder / "status.json"
    while not (status.exists() and json.loads(status.read_text())["samples"]):
        time.sleep(0.2)
    time.sleep(WARM_S)

    def stretch() -> float:
        """Samples a second, by the controller's own count and clock."""
        before = json.loads(status.read_text())
        time.sleep(stretch_s)
        after = json.loads(status.read_text())
        return float((after["samples"] - before["samples"]) / (after["at"] - before["at"]))

    ratios: list[float] = []
    for _ in range(number):
        quiet = stretch()
        undo = do(json.loads((folder / "monitor.json").read_text())["pid"])
        ratios.append(stretch() / quiet)
        undo()
        time.sleep(2.0)  # it comes back
    run.send_signal(signal.SIGINT)
    return ratios, result_of(run)


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--stretch", type=float, default=6.0)
    parser.add_argument("--number", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    parent = Path("runs") / f"watching-{time.strftime('%Y%m%d-%H%M%S')}"
    ratios: dict[str, list[float]] = {"on": []}
    for turn in range(args.turns):
        order = (True, False) if turn % 2 else (False, True)
        rates = {on: samples_per_s(on, args.seconds, parent / f"{turn}-{on}") for on in order}
        ratios["on"].append(rates[True] / rates[False])
    lost: dict[str, object] = {}
    for name, do in (("killed", kill), ("paused", pause)):
        if args.number:
            found, result = stretches(do, args.stretch, args.number, parent / name)
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
