"""What the monitor's process costs with many workers and viewers.

    python tests/bench/monitor_cost.py --workers 1000 --viewers 10 --seconds 30

A simulation is made into bytes before; then they are sent when they are due, over as many
connections as there are workers, to a real process that real viewers look at. Prints its share of a
core, bytes of a tick and its memory.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time

import aiohttp
import zmq

from distbelief.chronicle import encode
from distbelief.monitor.simulate import Simulation, straggler
from distbelief.open_files import allow_files
from distbelief.param_server.report import ShardReport, WorkerReport
from distbelief.param_server.wire import encode as frame

CLOCK = os.sysconf("SC_CLK_TCK")
WARM_S = 10


def cpu_s(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--viewers", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=30)
    args = parser.parse_args()
    allow_files(args.workers + args.viewers)
    length = args.seconds + WARM_S
    made = time.time()
    faults = [straggler("w17", 6.0, 3.0)]
    simulation = Simulation(args.workers, 4, seed=1, start=0.0, run="aa", token="t", faults=faults)
    plan = []
    for message in simulation.until(float(length)):
        if isinstance(message, WorkerReport | ShardReport):
            plan.append((message.at, message.name, frame(message)))
        else:
            plan.append((message.at, "", encode(message)))
    print(f"{len(plan)} messages made in {time.time() - made:.0f} s", flush=True)
    asyncio.run(play(args, plan))


async def play(args, plan):
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief.monitor.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    config = {"run": "aa", "token": "t", "access": "s", "num_workers": args.workers}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    said = json.loads(process.stdout.readline())
    context = zmq.Context()
    sockets = {}
    for name in {name for _, name, _ in plan if name}:
        sockets[name] = context.socket(zmq.PUSH)
        sockets[name].setsockopt(zmq.LINGER, 0)
        sockets[name].setsockopt(zmq.SNDHWM, 2)
        sockets[name].connect(said["feed"])
    ticks = [0] * args.viewers
    sizes: list[int] = []
    viewers = [asyncio.create_task(view(said["url"], i, ticks, sizes)) for i in range(args.viewers)]
    dropped = 0
    start = time.time()
    before = begun = 0.0
    for at, name, message in plan:
        while (late := start + at - time.time()) > 0:
            await asyncio.sleep(min(late, 0.01))
        if not begun and at > WARM_S:
            before, begun = cpu_s(process.pid), time.time()
        if not name:
            process.stdin.write(message)
            process.stdin.flush()
            continue
        try:
            sockets[name].send(message, zmq.NOBLOCK)
        except zmq.Again:
            dropped += 1
    share = (cpu_s(process.pid) - before) / (time.time() - begun)
    with open(f"/proc/{process.pid}/status") as file:
        memory = next(line.split()[1] for line in file if line.startswith("VmRSS"))
    behind_s = time.time() - start - plan[-1][0]
    print(
        f"{args.workers} workers, {args.viewers} viewers: {share:.1%} of a core, "
        f"tick {max(sizes, default=0)} bytes, {min(ticks, default=0)} ticks at the slowest viewer, "
        f"{int(memory) // 1024} MB, {dropped} reports dropped, sender {behind_s:.1f} s late"
    )
    for viewer in viewers:
        viewer.cancel()
    await asyncio.gather(*viewers, return_exceptions=True)
    process.kill()
    process.wait()
    context.destroy(linger=0)


async def view(url, i, ticks, sizes):
    address, _, key = url.partition("?k=")
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.get(
            address + "api/v1/stream", headers={"X-DB-Token": key}, read_bufsize=2**20
        ) as answer,
    ):
        async for line in answer.content:
            if line.startswith(b'data: {"seq"') and b'"w":{' in line:
                ticks[i] += 1
                sizes.append(len(line))


if __name__ == "__main__":
    main()
