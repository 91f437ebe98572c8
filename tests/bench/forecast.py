"""What `distbelief simulate` says, beside real runs on this machine: computing is a sleep
(`sleeper`), everything else is real: launcher, controller, shards, workers, TCP or shared memory.

    python tests/bench/forecast.py [--seconds 25] [--constants FILE] [--json]

Throughput is by the controller's own count, after the start; staleness is the result's, of the
whole run. A forecast may be off by 15 %, of staleness by 1 where that is more. It is told what was
asked of the run (workers, lengths of steps and their noise), and one thing that was measured: what
a step takes besides sleeping, of one worker alone on this machine as busy as it is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distbelief.simulation.cluster import Cluster, Policy
from distbelief.simulation.constants import Constants
from distbelief.simulation.defaults import DEFAULTS
from distbelief.simulation.forecast import Forecast, forecast
from distbelief.simulation.steps import Steps

PARAMETERS = (256 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 10
"""Of the sleeper."""
BATCH = 4
SHARDS = 2
START_TIMEOUT_S = 180.0
WARM_S = 5.0
OFF, OFF_STALE = 0.15, 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """A run."""

    workers: int
    step_s: float
    noise: float = 0.2
    straggler: float = 1.0
    shares_memory: bool = False
    policy: Policy = "fresh"

    @property
    def name(self) -> str:
        words = [f"{self.workers} workers", f"{self.step_s:g} s", self.policy]
        words += [f"1x{self.straggler:g}"] if self.straggler != 1 else []
        return ", ".join([*words, "shared memory" if self.shares_memory else "TCP"])

    def cluster(self, more_s: float = 0.0) -> Cluster:
        """more_s: of a step, besides sleeping."""
        step_s = self.step_s + more_s
        # Of a straggler only the sleep is longer.
        factor = (self.straggler * self.step_s + more_s) / step_s
        return Cluster(
            workers=self.workers,
            shards=SHARDS,
            parameters=PARAMETERS,
            steps=Steps(step_s, self.noise * self.step_s / step_s),
            batch=BATCH,
            policy=self.policy,
            stragglers=int(self.straggler != 1),
            factor=factor,
            per_host=self.workers,
            is_apart=False,
            shares_memory=self.shares_memory,
        )


ALONE = Case(1, 0.5)
CASES = (
    Case(2, 0.5),
    Case(4, 0.5),
    Case(8, 0.8),
    Case(16, 1.0),
    Case(4, 0.5, straggler=4.0),
    Case(8, 0.8, straggler=4.0),
    Case(4, 0.5, policy="latest"),
    Case(2, 0.5, shares_memory=True),
    Case(8, 0.8, shares_memory=True),
    Case(16, 1.0, shares_memory=True),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run was like."""

    samples_per_s: float
    p50: float
    p95: float


def run(case: Case, seconds: float, parent: Path) -> Seen:
    """Raises: CalledProcessError if it fails; SystemExit if it does not start."""
    command = [sys.executable, "-m", "distbelief", "launch", "--model", "sleeper:Sleeper"]
    command += ["--engine", "local", "--data", "digits", "--batch-size", str(BATCH)]
    command += ["--workers", str(case.workers), "--shards", str(SHARDS), "--until", "1h"]
    command += ["--run-dir", str(parent), "--json", "--no-dashboard"]
    sets = {
        # Slow enough to learn nothing and never to diverge: what is asked is speed.
        "train.lr": "1e-5",
        "train.momentum": "0.0",
        "train.fetch_policy": case.policy,
        "net.shared_memory": str(case.shares_memory).lower(),
        "warm_workers": "true",
    }
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "SLEEPER_STEP_S": str(case.step_s),
        "SLEEPER_NOISE": str(case.noise),
        "SLEEPER_STRAGGLER": str(case.straggler),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, stderr=subprocess.DEVNULL)
    try:
        found = rate(process, parent, seconds)
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    if process.returncode not in (0, 130):
        raise subprocess.CalledProcessError(process.returncode, command)
    result = json.loads(out.decode().strip().splitlines()[-1])
    assert result["accounting"]["adds_up"]
    return Seen(found, result["staleness"]["p50"], result["staleness"]["p95"])


def rate(process: "subprocess.Popen[bytes]", parent: Path, seconds: float) -> float:
    """Samples a second, once it trains."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        for status in parent.glob("*/status.json"):
            if json.loads(status.read_text())["samples"]:
                time.sleep(WARM_S)
                before = json.loads(status.read_text())
                time.sleep(seconds)
                after = json.loads(status.read_text())
                return float((after["samples"] - before["samples"]) / (after["at"] - before["at"]))
        time.sleep(0.2)
    raise SystemExit(f"no step within {START_TIMEOUT_S:.0f} s, or it has ended")


def is_near(real: float, said: float, at_least: float = 0.0) -> bool:
    return abs(said - real) <= max(OFF * real, at_least)


def passes(seen: Seen, told: Forecast) -> bool:
    return (
        is_near(seen.samples_per_s, told.samples_per_s)
        and is_near(seen.p50, told.p50, OFF_STALE)
        and is_near(seen.p95, told.p95, OFF_STALE)
    )


def show(rows: Sequence[tuple[Case, Seen, Forecast]]) -> None:
    print("| run | samples/s | forecast | off | p50 | forecast | p95 | forecast | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case, seen, told in rows:
        off = told.samples_per_s / seen.samples_per_s - 1
        print(
            f"| {case.name} | {seen.samples_per_s:.1f} | {told.samples_per_s:.1f} | {off:+.1%} "
            f"| {seen.p50:g} | {told.p50} | {seen.p95:g} | {told.p95} "
            f"| {'PASS' if passes(seen, told) else 'FAIL'} |"
        )


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--constants", type=Path)
    parser.add_argument("--only", type=int, nargs="+", help="of the cases, from 0")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    constants = DEFAULTS
    if args.constants is not None:
        constants = Constants.from_json(args.constants.read_text())
    parent = Path("runs") / f"forecast-{time.strftime('%Y%m%d-%H%M%S')}"
    seen = run(ALONE, args.seconds, parent / "alone")
    said = forecast(ALONE.cluster(), constants)
    more_s = BATCH / seen.samples_per_s - BATCH / said.samples_per_s
    sys.stderr.write(f"one worker alone: {1e3 * more_s:.0f} ms a step besides sleeping\n")
    rows = []
    for number, case in enumerate(CASES):
        if args.only is None or number in args.only:
            told = forecast(case.cluster(max(0.0, more_s)), constants)
            seen = run(case, args.seconds, parent / str(number))
            rows.append((case, seen, told))
            sys.stderr.write(f"{case.name}: {seen} {told.samples_per_s} {told.p50} {told.p95}\n")
    if args.json:
        for case, seen, told in rows:
            line = {"type": "forecast", "v": 1, "case": asdict(case), "seen": asdict(seen)}
            line |= {
                "more_s": round(more_s, 4),
                "forecast": asdict(told),
                "passes": passes(seen, told),
            }
            print(json.dumps(line))
    else:
        print(f"one worker alone: {1e3 * more_s:.0f} ms a step besides sleeping\n")
        show(rows)
    sys.exit(not all(passes(seen, told) for _, seen, told in rows))


if __name__ == "__main__":
    main()
