"""What failures cost: GoogLeNet (28 MB of parameters) trained for ten minutes with a process killed
each 5 s, between two quiet runs of the same job.

    python tests/bench/goodput.py [--seconds 600] [--quiet 300] [--every 5] [--json]

Goodput is what is left in the surviving history, by second: work that was undone with a shard
counts once, when it was applied again. Half of the kills hit a shard, half a worker.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from distbelief.chaos.plan import FaultKind, Plan
from distbelief.chaos.trial import Trial
from distbelief.chaos.verdict import Verdict

JOB = (
    *("--engine", "local", "--workers", "2", "--shards", "2", "--until", "24h"),
    *("--model", "googlenet", "--data", "digits", "--batch-size", "16"),
    *("--set", "data.image_size=64", "--set", "warm_workers=true", "--set", "restarts=50"),
)


def run(name: str, seconds: float, every_s: float, parent: Path) -> tuple[Verdict, float]:
    """(Verdict, parts applied by second). every_s: 0 for a quiet run."""
    faults = tuple(
        FaultKind(kind="kill", target=target, every_s=2 * every_s)
        for target in ("shard", "worker")
        if every_s
    )
    plan = Plan(seconds=seconds, faults=faults)
    verdict = Trial(JOB, plan, parent / name, has_gradients=False, say=tell).run()
    rate = verdict.applied / seconds
    tell(f"{name}: {rate:.1f} parts a second, {verdict.kills} kills")
    return verdict, rate


def tell(text: str) -> None:
    """For a person."""
    sys.stderr.write(text + "\n")


def main() -> None:
    """Entry of the script; exit code 1 where something is violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--quiet", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    parent = Path("runs") / f"goodput-{time.strftime('%Y%m%d-%H%M%S')}"
    _, before = run("before", args.quiet, 0.0, parent)
    verdict, rate = run("faulty", args.seconds, args.every, parent)
    _, after = run("after", args.quiet, 0.0, parent)
    told = {
        "type": "goodput",
        "v": 1,
        "goodput": round(rate / statistics.mean([before, after]), 3),
        "quiet": [round(before, 1), round(after, 1)],
        "faulty": round(rate, 1),
        "kills": verdict.kills,
        "lost": verdict.lost,
        "lost_double_fault": verdict.lost_double_fault,
        "undone": verdict.undone,
        "recovery_s": {
            "p50": round(statistics.median(verdict.recovery_s), 3),
            "max": round(max(verdict.recovery_s), 3),
        },
        "violations": verdict.violations,
    }
    sys.stdout.write(json.dumps(told, indent=None if args.json else 2) + "\n")
    sys.exit(bool(verdict.violations))


if __name__ == "__main__":
    main()
