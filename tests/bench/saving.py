"""What safety costs: GoogLeNet trained by 4 workers with the defaults (snapshots every 30 s, pushes
kept until they are saved, a ledger of acks), and with none of it, in turns.

    python tests/bench/saving.py [--seconds 90] [--turns 3] [--store PLACE] [--json]

With --store it is what a store costs instead: `safe` copies its snapshots there, `bare` has the
defaults. The order is changed with every turn. Medians of the turns, and the ratio of each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

JOB = (
    *("--engine", "local", "--workers", "4", "--shards", "2"),
    *("--model", "googlenet", "--data", "digits", "--batch-size", "16"),
    # Slow enough to learn nothing and never to diverge: what it costs is asked.
    *("--set", "data.image_size=64", "--set", "train.lr=1e-5", "--set", "train.momentum=0.0"),
)
KINDS = {
    "safe": (),
    "bare": ("--set", "save.every_s=0", "--set", "save.ack=none"),
}


def samples_per_s(kind: str, seconds: int, parent: Path) -> float:
    """Of one run. Raises: CalledProcessError if it fails."""
    args = [*JOB, *KINDS[kind], "--until", f"{seconds}s", "--run-dir", str(parent), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "distbelief", "launch", *args], stdout=subprocess.PIPE, check=True
    )
    result = json.loads(done.stdout.decode().strip().splitlines()[-1])
    sys.stderr.write(f"{kind}: {result['samples_per_s']} samples/s, {result['updates']} updates\n")
    return float(result["samples_per_s"])


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=90)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--store", help="a URL or an absolute path")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.store:
        KINDS.update(safe=("--set", f"save.store={args.store}"), bare=())
    parent = Path("runs") / f"saving-{time.strftime('%Y%m%d-%H%M%S')}"
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.turns):
        for kind in sorted(KINDS, reverse=bool(turn % 2)):
            rates[kind].append(samples_per_s(kind, args.seconds, parent))
    ratios = [safe / bare for safe, bare in zip(rates["safe"], rates["bare"], strict=True)]
    told = {
        "type": "saving",
        "v": 1,
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "overhead": round(1 - statistics.median(ratios), 4),
        "samples_per_s": rates,
    }
    sys.stdout.write(json.dumps(told, indent=None if args.json else 2) + "\n")


if __name__ == "__main__":
    main()
