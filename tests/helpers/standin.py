"""A stand-in for the monitor's process: it writes down what it is told, and misbehaves on demand.

    python standin.py FILE MODE     FILE gets JSON lines: config, chronicle, reports

Modes: good; deaf (does not read the chronicle); mute (says nothing); junk (says what is no
answer); error (says why it cannot serve); dies (serves, and ends); stillborn (ends before it
serves, the first time); collects (good, and takes reports by the real Collector).
"""

import json
import os
import select
import sys
import time


def main(path, mode):
    # Bit by bit: what is in a buffer here could not be seen by `select`.
    rest = bytearray()
    while b"\n" not in rest:
        rest += os.read(0, 65_536)
    line, _, left = bytes(rest).partition(b"\n")
    config = json.loads(line)
    note(path, "config", config)
    if mode == "stillborn":
        with open(path) as file:
            if len(file.readlines()) == 1:
                sys.exit(4)
    collector, feed, close = None, "tcp://127.0.0.1:9", lambda: None
    if mode == "collects":
        collector, close = collect(config)
        feed = collector.endpoint
    port = config["wish"] or 4321
    told: dict[str, object] = {
        "url": f"http://127.0.0.1:{port}/?k={config['access']}",
        "feed": feed,
        "pid": 1,
    }
    if mode == "error":
        told = {"error": {"code": "DB-ENV-005", "what": "it cannot serve", "why": "a test"}}
    if mode == "junk":
        told = {"what": "is this"}
    if mode != "mute":
        os.write(1, json.dumps(told).encode() + b"\n")
    if mode == "dies":
        sys.exit(3)
    while mode in ("deaf", "mute"):
        time.sleep(0.02)
    hear(path, left, collector)
    close()


def collect(config):
    import zmq

    from distbelief.monitor.collector import Collector
    from distbelief.param_server.curve import Keys

    context = zmq.Context()
    keys = None if config["keys"] is None else Keys.from_dict(config["keys"])
    collector = Collector(
        context, config["run"], config["token"], config["feed_host"], config["feed_wish"], keys
    )

    def close():
        note(path=sys.argv[1], kind="counts", what=dict(collector.counts))
        collector.close()
        context.term()

    return collector, close


def hear(path, data, collector):
    """Until standard input ends, and what was on its way then has come."""
    end_at = None
    while end_at is None or time.monotonic() < end_at:
        *lines, data = data.split(b"\n")
        for line in lines:
            note(path, "told", json.loads(line))
        report = None if collector is None else collector.recv(0.01)
        if report is not None:
            from dataclasses import asdict

            note(path, "report", {"op": report.op, **asdict(report), "token": ""})
        if end_at is None and (collector is None or select.select([0], [], [], 0)[0]):
            more = os.read(0, 65_536)
            data += more
            if not more:
                end_at = time.monotonic() + (0.0 if collector is None else 0.5)


def note(path, kind, what):
    with open(path, "a") as file:
        file.write(json.dumps({"kind": kind, "what": what}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
