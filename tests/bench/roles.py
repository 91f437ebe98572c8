"""Roles: processes for tests of crews; they load nothing heavy."""

import os
import subprocess
import sys
import time

from distbelief.bench.station import Station


def count_up(station: Station) -> None:
    """A worker that only counts."""
    station.hear()
    station.say(pid=os.getpid(), cores=sorted(os.sched_getaffinity(0)))
    station.seat.do_rounds(lambda: time.sleep(0.001), lambda: None, lambda: (0.0, 0.0))


def fail(station: Station) -> None:
    raise RuntimeError("no such luck")


def fall_silent(station: Station) -> None:
    time.sleep(60)


def leave_at_once(station: Station) -> None:
    station.hear()
    station.say()


def start_a_child(station: Station) -> None:
    station.hear()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    station.say(child=child.pid)
    time.sleep(60)
