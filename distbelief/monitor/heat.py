"""Heat: the picture of all workers over time, made small enough to be sent. No clock."""

import numpy as np
from numpy.typing import NDArray

from distbelief.monitor import history
from distbelief.monitor.fleet import Fleet, natural
from distbelief.monitor.history import DOWN, FIRST, STEPS, Curves, Rows
from distbelief.monitor.source import Group, Heatmap, Metric

ALONE = 256
"""Workers up to which each has a row of its own where rows are by node."""
RANGE: dict[Metric, tuple[float, float]] = {
    "ratio": (-2.0, 6.0),
    "updates": (0.0, 14.0),
    "seconds": (-4.0, 8.0),
}
"""Powers of two at both ends."""
COLS_MAX, ROWS_MAX = 2000, 1000


def heatmap(
    fleet: Fleet,
    rows_of: Rows,
    curves: Curves,
    now: float,
    start: float,
    end: float,
    cols: int,
    rows: int,
    group: Group,
    metric: Metric,
    node: str,
) -> Heatmap:
    """As Source.heatmap has it. Raises: ValueError for a group or metric that there is not."""
    if group not in ("node", "worker", "worst") or metric not in RANGE:
        raise ValueError(f"no heatmap of {metric!r} by {group!r}")
    cols, rows = min(max(cols, 1), COLS_MAX), min(max(rows, 1), ROWS_MAX)
    lo, hi = RANGE[metric]
    end = min(end, now + 1)
    start = min(start, end)
    names = [i for i in range(len(fleet)) if not node or fleet.hosts[i] == node]
    names.sort(key=lambda i: (natural(fleet.hosts[i]), natural(fleet.names[i])))
    order = np.array(names, np.int64)
    lag = rows_of.block("lag", start, end, now).columns(cols)
    cells = lag.pick(order)
    if metric == "seconds":
        age = rows_of.block("age", start, end, now).columns(cols).pick(order)
        cells = np.where(cells == DOWN, DOWN, age)
    # The worst of several is chosen among codes: less is left to be converted.
    ids = [fleet.names[i] for i in names]
    nodes = [fleet.hosts[i] for i in names]
    if group == "worst":
        worst = np.argsort(-cells.sum(axis=1, dtype=np.int64), kind="stable")[:rows]
        cells = cells[worst]
        ids, nodes = [ids[i] for i in worst], [nodes[i] for i in worst]
    elif group == "node" and not node and len(ids) > ALONE:
        cells, begins = merge(
            cells,
            [n for i, n in enumerate(nodes) if not i or nodes[i - 1] != n],
            [i for i, n in enumerate(nodes) if not i or nodes[i - 1] != n],
        )
        ids = nodes = begins
    if len(ids) > rows:
        size = -(-len(ids) // rows)
        first = list(range(0, len(ids), size))
        last = [min(i + size, len(ids)) - 1 for i in first]
        labels = [
            ids[i] if i == j else f"{ids[i]}..{ids[j]}" for i, j in zip(first, last, strict=True)
        ]
        cells, ids = merge(cells, labels, first)
        nodes = [nodes[i] for i in first]
    at = lag.t0 + (np.arange(cells.shape[1]) + 1) * lag.bin_s - 1
    shift = np.log2(fair_at(curves, at, fleet.fair)) * STEPS if metric == "ratio" else 0.0
    # Codes are logarithms, so a division by the fair share is a difference.
    with np.errstate(invalid="ignore"):
        power = (cells.astype(np.float32) - FIRST - shift) / STEPS + history.LO
    code = np.clip(np.round((power - lo) / (hi - lo) * 253) + 2, 2, 255)
    code = np.where(cells == history.ZERO, 2, code)
    out = np.where(cells == 0, 0, np.where(cells == DOWN, 1, code)).astype(np.uint8)
    return Heatmap(
        rows=len(ids),
        cols=out.shape[1],
        t0=float(lag.t0),
        bin_s=float(lag.bin_s),
        ids=ids,
        nodes=nodes,
        lo=lo,
        hi=hi,
        data=out.tobytes(),
    )


def merge(
    cells: NDArray[np.uint16], labels: list[str], begins: list[int]
) -> tuple[NDArray[np.uint16], list[str]]:
    """The worst of some rows that lie together, by where each group of them begins."""
    return np.maximum.reduceat(cells, begins, axis=0), labels


def fair_at(curves: Curves, at: NDArray[np.int64], now: float | None) -> NDArray[np.float64]:
    """Fair share at each time, one update at least; where it is not known, what it was before."""
    values = np.full(len(at), np.nan)
    if len(at):
        begin, end = int(at[0]), int(at[-1]) + 1
        if end - begin <= len(curves.near):
            near = curves.window("fair", begin, end)
            values = near[np.clip(at - begin, 0, len(near) - 1)]
    known = ~np.isnan(values)
    if known.any():
        last = np.maximum.accumulate(np.where(known, np.arange(len(values)), -1))
        values = values[np.where(last < 0, np.argmax(known), last)]
    else:
        values[:] = now or 1.0
    held: NDArray[np.float64] = np.maximum(values, 1.0)
    return held
