"""How long the page takes for a frame with many workers, and how large a tick is.

    python tests/bench/frames.py --workers 1000 --seconds 30 [--json]

A real headless Chromium shows a simulated run as it goes on. The page tells the time of each frame
in which it painted anything, until the browser has laid it out; told are quantiles of the
newest ones, after a while in which all has been drawn once.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import urllib.request

from playwright.sync_api import sync_playwright

WARM_S = 8


def start(workers: int) -> "tuple[subprocess.Popen[bytes], str]":
    """A monitor that simulates, and where it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief.monitor.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    config = {"access": "", "simulate": {"workers": workers, "seed": 1}}
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    url: str = json.loads(process.stdout.readline())["url"]
    return process, url


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no chromium on this machine: apt-get install chromium")
    process, url = start(args.workers)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(url)
            page.wait_for_function(
                "() => window.distbelief?.run.link === 'live'", polling=200, timeout=120_000
            )
            page.wait_for_timeout(WARM_S * 1000)
            page.evaluate("() => window.distbelief.frames.splice(0)")
            page.wait_for_timeout(args.seconds * 1000)
            frames: list[float] = page.evaluate("() => [...window.distbelief.frames]")
            heap = page.evaluate("() => performance.memory?.usedJSHeapSize ?? 0")
            with urllib.request.urlopen(f"{url}api/v1/snapshot", timeout=10) as reply:
                seq = json.load(reply)["seq"]
            with urllib.request.urlopen(f"{url}api/v1/delta?after={seq - 5}", timeout=10) as reply:
                items = json.load(reply)
            browser.close()
    finally:
        process.kill()
        process.wait()
    ticks = [
        len(json.dumps(i["data"], separators=(",", ":"))) for i in items if i["event"] == "tick"
    ]
    cuts = statistics.quantiles(frames, n=100)
    told = {
        "type": "frames",
        "v": 1,
        "workers": args.workers,
        "frames": len(frames),
        "p50_ms": round(cuts[49], 1),
        "p95_ms": round(cuts[94], 1),
        "max_ms": round(max(frames), 1),
        "tick_bytes": max(ticks),
        "heap_mb": round(heap / 1e6, 1),
    }
    sys.stdout.write(json.dumps(told, indent=None if args.json else 2) + "\n")


if __name__ == "__main__":
    main()
