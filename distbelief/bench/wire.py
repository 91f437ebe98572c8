"""Wire: how fast gradients go to the shards and parameters come back, with no computing at all.

Every system does the work of work.py, in processes of its own, in turns with the others; its
result is checked. A row is one system with so many workers and shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from distbelief.bench.crew import Crew
from distbelief.bench.floor import FLOORS
from distbelief.bench.ours import FLOAT32, NAME, ours
from distbelief.bench.plot import Bar
from distbelief.bench.race import Entry, Race
from distbelief.bench.system import System
from distbelief.bench.table import Column, share, spread
from distbelief.bench.window import Spread, ratios
from distbelief.bench.work import Work
from distbelief.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class WireConfig:
    """What to measure: every combination of workers and shards, each with all transports."""

    workers: Sequence[int] = (1,)
    shards: Sequence[int] = (1,)
    transports: Sequence[str] = ("shm", "tcp")
    size: int | None = None
    """Parameters; None takes GoogLeNet's."""
    compress: str = FLOAT32
    durability: str = "none"
    snapshot_s: float = 1.0
    """Between two snapshots, with durability `snapshots`."""
    seconds: float = 2.0
    """Of a window."""
    windows: int = 5
    with_floors: bool = False
    peers: Sequence[System] = ()
    """Other systems that run in turns with ours."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Of all processes, besides the driver's."""

    def systems(self) -> list[System]:
        """All that run in turns."""
        mine = [
            ours(
                transport,
                compress=self.compress,
                durability=self.durability,
                snapshot_s=self.snapshot_s,
                workers=max(self.workers),
            )
            for transport in self.transports
        ]
        return [*mine, *(FLOORS.values() if self.with_floors else ()), *self.peers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system with so many workers and shards. Figures are medians over the windows."""

    system: str
    transport: str
    workers: int
    shards: int
    rounds_per_s: float
    """Of all workers together."""
    rounds_per_s_min: float
    rounds_per_s_max: float
    gb_per_s: float
    """There and back, as if all was float32: rounds times 8 bytes a parameter."""
    cpu_s_per_gb: float
    """Processor seconds of all its processes."""
    server_rss_mb: float
    """All servers together: heap, files, and shared memory of their own."""
    server_growth_mb: float
    """From the end of the first window to that of the last."""
    server_mapped_mb: float
    """Memory of workers that servers merely map."""
    server_idle_rss_mb: float
    """As server_rss_mb, before there were parameters."""
    faults_per_round: float
    """Minor page faults of all its processes."""
    other_cpu: float
    """Share of the machine that others took: a row with much of it reads low."""
    check: str
    """right or wrong."""
    why: str
    """What is wrong."""
    looked: int
    """Fetched parts that were looked at."""
    torn: int
    """Those that were not of one moment."""
    pushes: int
    """That the parameters have seen, and do show."""
    windows: int
    size: int
    compress: str
    durability: str
    ratios: Mapping[str, Spread]
    """Rounds a second, to those of every other system in turn with it."""

    @property
    def label(self) -> str:
        return f"{self.system} {self.transport}" if self.system == NAME else self.system


def wire(config: WireConfig, on_progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Measure all of it. Raises: Problem where a process fails, or memory cannot be shared."""
    work = Work.of(config.size)
    most = len(work.layout.parts)
    if max(config.shards) > most:
        raise Problem(
            "DB-MODEL-003",
            f"{max(config.shards)} shards cannot share {work.size} parameters",
            why=f"they are {most} parts",
            fix=f"use at most {most} shards, or a larger --size",
        )
    rows: list[Row] = []
    for shards in config.shards:
        for workers in config.workers:
            rows += _race(config, work, workers, shards, on_progress)
    return rows


def _race(
    config: WireConfig,
    work: Work,
    workers: int,
    shards: int,
    on_progress: Callable[[str], None],
) -> Iterator[Row]:
    args = {"work": work.as_dict(), "numel": work.size}
    where = f"{workers} workers, {shards} shards"
    with ExitStack() as stack:
        crews = []
        for system in config.systems():
            on_progress(f"{where}: starting {system.label}")
            crew = stack.enter_context(Crew(system, workers, shards, args, config.env))
            _see_shared(crew)
            crews.append(crew)
        race = Race(crews, config.seconds, config.windows)

        def tell(entry: Entry) -> None:
            rate = entry.windows[-1].rounds_per_s
            number = f"window {len(entry.windows)} of {config.windows}"
            on_progress(f"{where}: {number}: {entry.crew.system.label} {rate:.1f} rounds/s")

        entries = race.run(tell)
        return iter([_row(entry, entries, config, work) for entry in entries])


def _see_shared(crew: Crew) -> None:
    if crew.system.transport == "shm" and not all(h.get("is_shared", True) for h in crew.heard):
        raise Problem(
            "DB-ENV-006",
            "workers and shards do not share memory here",
            why="memory files need Linux on x86-64 and one user's processes that see each other",
            fix="--transport tcp",
        )


def _row(entry: Entry, entries: Sequence[Entry], config: WireConfig, work: Work) -> Row:
    crew, verdict = entry.crew, entry.verdict
    assert verdict is not None
    rates = [window.rounds_per_s for window in entry.windows]
    rounds = Spread.of(rates)
    against = {
        other.crew.system.label: ratios(rates, [window.rounds_per_s for window in other.windows])
        for other in entries
        if other is not entry
    }
    is_ours = crew.system.name == NAME
    return Row(
        system=crew.system.name,
        transport=crew.system.transport,
        workers=crew.workers,
        shards=crew.shards,
        rounds_per_s=rounds.median,
        rounds_per_s_min=rounds.low,
        rounds_per_s_max=rounds.high,
        gb_per_s=Spread.of(w.gb_per_s(work.round_bytes) for w in entry.windows).median,
        cpu_s_per_gb=Spread.of(w.cpu_s_per_gb(work.round_bytes) for w in entry.windows).median,
        server_rss_mb=entry.resident[-1].own_mb,
        server_growth_mb=entry.resident[-1].own_mb - entry.resident[0].own_mb,
        server_mapped_mb=entry.resident[-1].mapped_mb,
        server_idle_rss_mb=crew.idle.own_mb,
        faults_per_round=Spread.of(w.faults_per_round for w in entry.windows).median,
        other_cpu=Spread.of(w.other_cpu for w in entry.windows).median,
        check="right" if verdict.is_right else "wrong",
        why=verdict.text,
        looked=verdict.looked,
        torn=verdict.torn,
        pushes=verdict.pushes,
        windows=len(entry.windows),
        size=work.size,
        compress=config.compress if is_ours else FLOAT32,
        durability=config.durability if is_ours else "none",
        ratios={label: found for label, found in against.items() if found is not None},
    )


def columns(rows: Sequence[Row]) -> list[Column[Row]]:
    """Of the table: with a ratio to each of the two floors that are there."""
    bases = [
        base for base in ("shm direct", "zmq simple") if any(base in row.ratios for row in rows)
    ]
    return [
        Column("system", lambda row: row.label, is_text=True),
        Column("W", lambda row: str(row.workers)),
        Column("S", lambda row: str(row.shards)),
        Column(
            "rounds/s", lambda r: spread(r.rounds_per_s, r.rounds_per_s_min, r.rounds_per_s_max)
        ),
        Column("GB/s", lambda row: f"{row.gb_per_s:.2f}"),
        *(Column(f"x {base}", _ratio_to(base)) for base in bases),
        Column("CPU s/GB", lambda row: f"{row.cpu_s_per_gb:.2f}"),
        Column("faults/round", lambda row: f"{row.faults_per_round:.0f}"),
        Column("server MB (idle)", _memory),
        Column("other CPU", lambda row: share(row.other_cpu)),
        Column("torn", lambda row: f"{row.torn}/{row.looked}"),
        Column("result", lambda row: row.check, is_text=True),
    ]


def _ratio_to(base: str) -> Callable[[Row], str]:
    def ratio(row: Row) -> str:
        found = row.ratios.get(base)
        return "-" if found is None else spread(found.median, found.low, found.high, digits=2)

    return ratio


def _memory(row: Row) -> str:
    if not row.server_rss_mb:
        return "-"
    idle = f"{row.server_idle_rss_mb:.0f}" if row.server_idle_rss_mb else "-"
    return f"{row.server_rss_mb:.0f} ({idle})"


def bars(rows: Sequence[Row]) -> list[Bar]:
    """For a plot."""
    return [
        Bar(
            f"{row.workers} workers\n{row.shards} shards",
            row.label,
            row.rounds_per_s,
            row.rounds_per_s_min,
            row.rounds_per_s_max,
        )
        for row in rows
    ]
