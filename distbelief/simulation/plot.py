"""Plot: a forecast over the number of workers: throughput, efficiency, staleness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distbelief.pictures import write_picture
from distbelief.simulation.forecast import Forecast


def plot(path: Path, title: str, forecasts: Sequence[Forecast]) -> None:
    """Draw forecasts, in the order of their workers. Raises: Problem as `write_picture`."""
    workers = [one.workers for one in forecasts]

    def onto(figure: Any) -> None:  # Any: matplotlib's Figure
        speed, efficiency, stale = figure.subplots(3, sharex=True)
        speed.plot(workers, [one.samples_per_s for one in forecasts], "o-", label="forecast")
        speed.plot(workers, [one.alone for one in forecasts], "--", label="if nobody waited")
        speed.set_title(title, fontsize="medium")
        speed.set_ylabel("samples/s")
        efficiency.plot(workers, [100 * one.efficiency for one in forecasts], "o-")
        efficiency.set_ylabel("efficiency, %")
        efficiency.set_ylim(0, 105)
        for name in ("p50", "p95", "max"):
            stale.plot(workers, [getattr(one, name) for one in forecasts], "o-", label=name)
        stale.set_ylabel("staleness")
        stale.set_xlabel("workers")
        for axes in (speed, efficiency, stale):
            axes.grid(alpha=0.3)
            for line in axes.lines:
                line.set_markersize(3)
        if workers[-1] >= 30 * workers[0]:
            stale.set_xscale("log")
            speed.set_yscale("log")
            stale.set_yscale("symlog")
        speed.legend(fontsize="small")
        stale.legend(fontsize="small")

    write_picture(path, onto, 7.0, 8.0)
