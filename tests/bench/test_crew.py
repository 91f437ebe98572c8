"""Crews: processes that are started, ordered about, and gone afterwards whatever happens."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from distbelief.bench.board import Order
from distbelief.bench.crew import Crew
from distbelief.bench.race import Race
from distbelief.bench.system import System
from distbelief.problem import Problem
from tests.helpers.children import is_stopped, until

ROOT = Path(__file__).resolve().parents[2]
ROLES = "tests.bench.roles"
ENV = {"PYTHONPATH": str(ROOT)}


def crew(role: str, workers: int = 1, *, never_rests: bool = False, **options) -> Crew:
    system = System(
        name="counting",
        transport="none",
        worker=f"{ROLES}:{role}",
        has_folder=True,
        never_rests=never_rests,
    )
    return Crew(system, workers, 1, {}, ENV, **options)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.integration
def test_a_crew_runs_when_it_is_told_and_is_gone_in_the_end():
    with crew("count_up", 2) as made:
        pids = [heard["pid"] for heard in made.heard]
        assert [seat.progress[0] for seat in made.taken] == [0, 0]
        made.tell(Order.RUN, range(1, 2))
        made.wait_for(lambda: made.taken[1].progress[0] >= 3, 10, "")
        made.hold()
        assert made.taken[0].progress[0] == 0
        (entry,) = [Race([made], 0.05, 2).entries[0]]
        assert entry.windows == []
        assert made.use().cpu_s > 0
    assert not any(map(is_alive, pids))


@pytest.mark.integration
def test_a_crew_that_never_rests_is_stopped_while_others_run():
    with crew("count_up", never_rests=True) as made:
        pid = made.heard[0]["pid"]
        until(lambda: is_stopped(pid))
        for _ in range(2):
            seat = made.taken[0]
            goal = seat.progress[0] + 3
            made.tell(Order.RUN)
            until(lambda seat=seat, goal=goal: seat.progress[0] >= goal)  # type: ignore[misc]
            made.hold()
            until(lambda: is_stopped(pid))
    assert not is_alive(pid)


@pytest.mark.integration
def test_processes_may_be_given_a_core():
    core = max(os.sched_getaffinity(0))
    with crew("count_up", cores=(core, 0)) as made:
        assert made.heard[0]["cores"] == [core]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("role", "options", "what", "why"),
    [
        ("fail", {}, "ended with exit code 1", "RuntimeError: no such luck"),
        ("no_such_role", {}, "ended with exit code 1", "no_such_role"),
        ("fall_silent", {"start_s": 0.5}, "said nothing in time", ""),
    ],
)
def test_a_process_that_does_not_come_up_is_a_problem_with_its_last_words(role, options, what, why):
    with pytest.raises(Problem) as caught, crew(role, **options):
        pass
    assert caught.value.code == "DB-ENV-006"
    assert what in caught.value.what
    assert why in caught.value.why


@pytest.mark.integration
def test_a_process_that_ends_while_others_wait_for_it_is_a_problem():
    with pytest.raises(Problem, match="ended with exit code 0"), crew("leave_at_once") as made:
        made.wait_for(lambda: False, 10, "")


@pytest.mark.integration
def test_after_a_failure_nothing_is_waited_for_and_nothing_is_left():
    began = time.monotonic()
    child = 0
    try:
        with crew("start_a_child") as made:
            child = made.heard[0]["child"]
            assert is_alive(child)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert time.monotonic() - began < 8  # its own end would come after 60 s
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)
