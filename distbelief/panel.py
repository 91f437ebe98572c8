"""Panel: what a person sees of a run in a terminal: a Sight as something that rich can draw. Pure.

Colours never stand alone: states have marks of their own, phases shades. Where the terminal is
narrow the history goes first, then the phases, then the node; where it is low, rows go.
"""

import math
import time
from collections.abc import Mapping, Sequence

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from distbelief.sight import Finding, Happened, Median, Number, Page, Sight, WorkerSeen

MARKS = {
    "starting": ("○", "dim"),
    "ok": ("●", "green"),
    "watch": ("■", "yellow"),
    "slow": ("◆", "bold red"),
    "stalled": ("◇", "bold red"),
    "down": ("✕", "bold red"),
    "recovering": ("↻", "blue"),
    "draining": ("◌", "dim"),
    "left": ("·", "dim"),
}
EVENT_MARKS = {
    "join": ("+", "green"),
    "crash": ("✕", "red"),
    "recover": ("↻", "blue"),
    "drain": ("◌", ""),
    "leave": ("·", ""),
    "quarantine": ("✕", "red"),
    "checkpoint": ("◆", "dim"),
    "storage": ("!", "red"),
    "error": ("✕", "bold red"),
    "slow": ("▲", "yellow"),
    "well": ("●", "green"),
}
SEVERITY = {"error": "bold red", "warn": "yellow", "info": "dim"}
PHASES = (
    ("compute", "█", "blue"),
    ("fetch", "▒", "cyan"),
    ("push", "░", "yellow"),
    ("data", "▓", "magenta"),
)
"""Name, shade and colour, as they follow each other in a bar."""
TIMES = "\N{MULTIPLICATION SIGN}"
BAR = 24
SPARK = 15
LEVELS = "▁▂▃▄▅▆▇█"
LOWEST, HIGHEST = -1.0, 3.0
"""log2 of the ratio at the first and the last of them: half and eight times the fair share."""
ROWS = 6
OTHER_LINES = 15
"""What the panel takes besides rows of workers, and some lines of what was said before."""
WIDEST = 120
LOW = 16
"""Lines of a terminal below which only the head is shown."""
WORKER, NODE = 10, 12
"""Characters of names that are shown."""
STALE_S = 5.0
"""A monitor that has heard nothing for so long is told apart."""


def panel(
    sight: Sight, width: int, height: int, *, keys: str = "", rows: int = ROWS
) -> RenderableType:
    """Draw a run. width, height: of the terminal. keys: the last line; what can be done."""
    width = min(width, WIDEST)
    lines: list[RenderableType] = [_head(sight), _bar(sight, width - 4), _speed(sight)]
    lines.append(_staleness(sight))
    if height >= LOW:
        if sight.page is not None and sight.page.items:
            lines.append(_workers(sight.page, width - 4, max(1, min(rows, height - OTHER_LINES))))
        if sight.findings:
            lines.append(_finding(sight.findings[0], len(sight.findings) - 1))
        lines += [_event(event) for event in sight.events[-2:]]
    if sight.unknown:
        lines.append(
            Text(f"not known: single workers, phases, findings: {sight.unknown}", "yellow")
        )
    elif sight.age_s is not None and sight.age_s > STALE_S:
        lines.append(Text(f"the monitor has heard nothing for {duration(sight.age_s)}", "yellow"))
    if keys:
        lines.append(Text(keys, "dim"))
    for line in lines:
        if isinstance(line, Text) and line.no_wrap is None:
            line.no_wrap, line.overflow = True, "ellipsis"
    box = Panel(Group(*lines), box=ROUNDED, title="distbelief", title_align="left")
    box.width = width
    return box


def _head(sight: Sight) -> Text:
    mark, style = ("●", "green") if sight.state == "training" else ("○", "yellow")
    text = Text.assemble((f"{mark} {clean(sight.state)}", style), "  ", (sight.run, "bold"))
    if sight.name:
        text.append(f"  {clean(sight.name)}")
    if sight.url:
        text.append("   dashboard ").append(sight.url, Style(color="blue", link=sight.url))
    return text


def _bar(sight: Sight, width: int) -> Text:
    done = sight.kpi.progress
    parts = []
    if done.done is not None and done.total:
        parts.append(f"{short(done.done)} / {short(done.total)} {done.unit or ''}".rstrip())
    elif done.samples is not None:
        parts.append(f"{short(done.samples)} samples")
    if done.share is not None:
        parts.append(f"{done.share:.1%}")
    if done.eta_s is not None:
        parts.append(f"{duration(done.eta_s)} left")
    words = "  ".join(parts)
    if done.share is None:
        return Text(words)
    cells = max(0, width - len(words) - 2)
    filled = round(cells * min(1.0, max(0.0, done.share)))
    return Text.assemble(("━" * filled, "green"), ("─" * (cells - filled), "dim"), "  ", words)


def _speed(sight: Sight) -> Text:
    kpi = sight.kpi
    slope = kpi.loss_slope_per_min
    arrow = "" if slope is None else " ▼" if slope < 0 else " ▲" if slope > 0 else " ="
    text = Text.assemble("loss ", (number(kpi.loss), "bold"), arrow)
    if kpi.val_loss is not None:
        text.append(f"  val {number(kpi.val_loss)}")
    rate = "-" if kpi.samples_per_s is None else f"{kpi.samples_per_s:,.0f}"
    text.append(f"   {rate} samples/s")
    if kpi.updates_per_s is not None:
        text.append(f"   {kpi.updates_per_s:,.1f} upd/s")
    counted = kpi.workers
    of = "" if counted.target is None else f"/{counted.target}"
    is_short = counted.target is not None and (counted.alive or 0) < counted.target
    text.append("   workers ").append(f"{whole(counted.alive)}{of}", "yellow" if is_short else "")
    if sight.shards:
        serving = sum(shard.status == "serving" for shard in sight.shards)
        style = "" if serving == len(sight.shards) else "yellow"
        text.append("   shards ").append(f"{serving}/{len(sight.shards)}", style)
    if kpi.refused:
        text.append(f"   refused {kpi.refused:,}", "red")
    return text


def _staleness(sight: Sight) -> Text:
    stale = sight.kpi.staleness
    text = Text("staleness")
    for name, value in (("p50", stale.p50), ("p95", stale.p95), ("max", stale.max)):
        times = "" if value is None or not stale.fair else f" ({value / stale.fair:.1f}{TIMES})"
        text.append(f" {name} ").append(whole(value), "bold").append(times + " ")
    text.append(f" fair share {number(stale.fair)}")
    return text


def _workers(page: Page, width: int, rows: int) -> Table:
    names = min(WORKER, max(6, *(len(worker.id) for worker in page.items)))
    nodes = min(NODE, max(4, *(len(worker.node or "") for worker in page.items)))
    # Mark, name, behind, times and step are always there, with two blanks between columns.
    left = width - (1 + 1 + names + 2 + 7 + 2 + 5 + 2 + 7) - (2 + nodes)
    has_node = left >= 0
    has_phases = has_node and left >= 2 + BAR
    has_spark = has_phases and left >= 2 + BAR + 2 + SPARK
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=2 + names, no_wrap=True, overflow="ellipsis")
    if has_node:
        table.add_column(width=nodes, no_wrap=True, overflow="ellipsis")
    for size in (7, 5, 7):
        table.add_column(width=size, justify="right", no_wrap=True)
    if has_phases:
        table.add_column(width=BAR, no_wrap=True)
    if has_spark:
        table.add_column(width=SPARK, no_wrap=True)

    def add(
        mark: tuple[str, str],
        name: str,
        node: str,
        seen: WorkerSeen | Median,
        spark: Sequence[Number],
    ) -> None:
        sign, style = mark
        cells = [Text.assemble((sign, style), " ", clean(name))]
        cells += [Text(clean(node))] if has_node else []
        times = "-" if seen.ratio is None else f"{seen.ratio:.1f}"
        cells += [Text(whole(seen.lag)), Text(times, style), Text(step(seen.step_s))]
        cells += [phases(seen.phases_s, seen.step_s)] if has_phases else []
        cells += [sparkline(spark)] if has_spark else []
        table.add_row(*cells)

    heads = [Text("  worker"), *([Text("node")] if has_node else [])]
    heads += [Text("behind"), Text(TIMES), Text("step")]
    heads += [legend()] if has_phases else []
    heads += [Text("15 min")] if has_spark else []
    for head in heads:
        head.stylize("dim")
    table.add_row(*heads)
    for worker in page.items[:rows]:
        mark = MARKS.get(worker.status, ("?", ""))
        add(mark, worker.id, worker.node or "", worker, worker.spark)
    add(("≈", "dim"), "median", "", page.median, ())
    return table


def legend() -> Text:
    """The shades of a bar, named: as wide as the bar."""
    shorter = {"compute": "comp"}
    return Text(" ").join(
        Text(f"{shade}{shorter.get(name, name)}", color) for name, shade, color in PHASES
    )


def phases(seconds: Mapping[str, Number], step_s: Number) -> Text:
    """Where the time of a step goes, as a bar; what is left blank is other work."""
    text = Text()
    whole_s = max(step_s or 0.0, sum(seconds.get(name) or 0.0 for name, _, _ in PHASES))
    if not whole_s:
        return text
    drawn, until = 0, 0.0
    for name, shade, color in PHASES:
        until += seconds.get(name) or 0.0
        end = round(BAR * until / whole_s)
        text.append(shade * (end - drawn), color)
        drawn = end
    return text


def sparkline(ratios: Sequence[Number]) -> Text:
    """The worst ratio of each minute; blank where nothing is known."""
    text = Text()
    size = max(1, -(-len(ratios) // SPARK))
    for i in range(0, len(ratios), size):
        known = [ratio for ratio in ratios[i : i + size] if ratio is not None]
        if not known:
            text.append(" ")
            continue
        height = (math.log2(max(max(known), 1e-6)) - LOWEST) / (HIGHEST - LOWEST)
        level = min(len(LEVELS) - 1, max(0, int(height * len(LEVELS))))
        text.append(LEVELS[level], "red" if level >= 4 else "yellow" if level >= 3 else "dim")
    return text


def _finding(finding: Finding, more: int) -> Text:
    text = Text("▲ " if finding.severity != "info" else "● ", SEVERITY.get(finding.severity, ""))
    text.append(clean(finding.text))
    text.no_wrap = False  # it says what to do, at its end
    return text.append(f"  +{more} more", "dim") if more else text


def _event(event: Happened) -> Text:
    mark, style = EVENT_MARKS.get(event.kind, ("·", "dim"))
    return Text.assemble(
        (f"{clock(event.at)} ", "dim"), (f"{mark} ", style), clean(event.text or event.kind)
    )


# Words and numbers


def clean(text: str) -> str:
    """Text that others have written, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def clock(at: float) -> str:
    """Local time."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def number(value: Number) -> str:
    """Four digits of it."""
    return "-" if value is None else f"{value:.4g}"


def whole(value: Number) -> str:
    return "-" if value is None else f"{value:,.0f}"


def step(seconds: Number) -> str:
    """The length of a step."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def short(value: Number) -> str:
    """65.8 k for 65,800."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def duration(seconds: Number) -> str:
    """1h 27m."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
    )
