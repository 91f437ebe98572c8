"""Race: several crews alive, one of them running at a time, in turns; then each is checked.

The machine's speed moves by a fifth from minute to minute, so a figure alone says little; windows
of two systems that lie within seconds of each other share the machine's mood, and their ratio
holds.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distbelief.bench.board import Order, Seat
from distbelief.bench.crew import Crew
from distbelief.bench.machine import Resident
from distbelief.bench.system import System
from distbelief.bench.window import Window, between, look
from distbelief.bench.work import Course

ROUNDS_MIN = 3
"""Of each worker in a window, however long that takes."""
PATIENCE_S = 60.0
"""For a window in which some worker does not get that far."""
CHECK_S = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether what a crew computed is right."""

    is_right: bool
    text: str
    """Why not; empty where it is."""
    looked: int
    """Parts that workers looked at while all ran."""
    torn: int
    """Those whose elements were not of one moment."""
    pushes: int
    """That the parameters had seen in the end."""


@dataclass(slots=True)
class Entry:
    """A crew in the race, and what came of it."""

    crew: Crew
    windows: list[Window] = field(default_factory=list)
    verdict: Verdict | None = None
    resident: list[Resident] = field(default_factory=list)
    """Memory of the servers, after each window."""


class Race:
    """See the top of this file."""

    def __init__(
        self, crews: Sequence[Crew], seconds: float, windows: int, warm_s: float | None = None
    ) -> None:
        """windows: of `seconds` each, of each crew. warm_s: running before the clock starts."""
        self.entries = [Entry(crew) for crew in crews]
        self._seconds = seconds
        self._windows = windows
        self._warm_s = min(0.3, seconds) if warm_s is None else warm_s
        self._course = Course()
        self._num_cpus = os.cpu_count() or 1

    def run(self, on_window: Callable[[Entry], None] = lambda entry: None) -> list[Entry]:
        """All windows, then the checks. Raises: Problem if a process fails."""
        for turn in range(self._windows):
            # There and back: what comes later in a turn has no advantage in the sum.
            for entry in self.entries if turn % 2 == 0 else reversed(self.entries):
                entry.windows.append(self._window(entry.crew))
                entry.resident.append(entry.crew.resident())
                on_window(entry)
        for entry in self.entries:
            entry.verdict = check(entry.crew, self._course, min(CHECK_S, self._seconds))
        return self.entries

    def _window(self, crew: Crew) -> Window:
        crew.tell(Order.RUN)
        _let_run(crew, self._warm_s)
        first = look(crew)
        _let_run(crew, self._seconds)
        last = look(crew)
        crew.hold()
        return between(first, last, self._num_cpus)


def _let_run(crew: Crew, seconds: float) -> None:
    """Wait so long, and until every worker has done some rounds."""
    until = time.monotonic() + seconds
    goals = [seat.progress[0] + ROUNDS_MIN for seat in crew.taken]
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
        crew.check()
    crew.wait_for(
        lambda: all(s.progress[0] >= goal for s, goal in zip(crew.taken, goals, strict=True)),
        PATIENCE_S,
        f"for {ROUNDS_MIN} rounds",
    )


def check(crew: Crew, course: Course, seconds: float) -> Verdict:
    """Have all workers look at what they fetch, then one push alone, and count what was pushed."""
    crew.tell(Order.CHECK)
    _let_run(crew, seconds)
    crew.hold()
    alone = crew.seats if crew.system.is_synchronous else range(1)
    crew.tell(Order.STEP, alone)
    before = crew.taken[0].progress[0]
    crew.wait_for(
        lambda: crew.taken[0].progress[0] > before and crew.board.is_followed(alone),
        PATIENCE_S,
        "for one round",
    )
    crew.hold()  # so that what was fetched is published
    return judge(crew.system, crew.taken, course)


def judge(system: System, seats: Sequence[Seat], course: Course) -> Verdict:
    """Of what the seats of a system's workers say."""
    looked, torn, wrong, refused = (sum(x) for x in zip(*(s.looked for s in seats), strict=True))
    rounds = [seat.progress[0] for seat in seats]
    pushes = rounds[0] if system.is_synchronous else sum(rounds)
    faults = []
    for seat in seats if system.is_synchronous else seats[:1]:
        low, high = seat.fetched
        if not course.agrees(low, high, pushes, system.tolerance):
            want = course.after(pushes)
            faults.append(f"after {pushes} pushes parameters are {low} to {high}, not {want}")
    if system.is_synchronous and len(set(rounds)) > 1:
        faults.append(f"workers did {rounds} rounds")
    if not looked:
        faults.append("nobody looked at what was fetched")
    if system.is_whole and torn:
        faults.append(f"{torn} of {looked} parts were torn")
    if wrong:
        faults.append(f"{wrong} of {looked} parts had values of another version")
    if refused:
        faults.append(f"{refused} parts were refused")
    return Verdict(not faults, "; ".join(faults), looked, torn, pushes)
