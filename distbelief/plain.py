"""Plain: a run in lines of key=value, for logs and for programs that read them. Pure.

11:42:00 update=65800 samples=2105600/14400000 loss=2.25 samples_s=9482 p50=61 p95=79
    max=256(w17) alive=64/64 eta=1h27m                                      (one line)
11:42:07 event=crash who=w42 text="w42 is lost: killed by signal 9"
"""

import json

from distbelief.panel import clean, clock, duration, number
from distbelief.sight import Happened, Number, Sight


def tick_line(sight: Sight) -> str:
    """How the run is."""
    kpi = sight.kpi
    done, stale, counted = kpi.progress, kpi.staleness, kpi.workers
    share = "" if done.share is None else f" share={done.share:.1%}"
    total = f"/{done.total:.0f}" if done.total is not None and done.unit == "samples" else ""
    worst = f"({clean(stale.worst)})" if stale.worst and stale.max is not None else ""
    target = "" if counted.target is None else f"/{counted.target}"
    eta = "-" if done.eta_s is None else duration(done.eta_s).replace(" ", "")
    refused = f" refused={kpi.refused}" if kpi.refused else ""
    state = "" if sight.state == "training" else f" state={clean(sight.state)}"
    return (
        f"{clock(sight.t)}{state} update={_or_dash(done.updates)} "
        f"samples={_or_dash(done.samples)}{total}{share} loss={number(kpi.loss)} "
        f"samples_s={_or_dash(kpi.samples_per_s)} p50={_or_dash(stale.p50)} "
        f"p95={_or_dash(stale.p95)} max={_or_dash(stale.max)}{worst} "
        f"alive={_or_dash(counted.alive)}{target} eta={eta}{refused}"
    )


def event_line(event: Happened) -> str:
    """What happened."""
    who = f" who={clean(event.who)}" if event.who else ""
    text = json.dumps(clean(event.text), ensure_ascii=False)
    return f"{clock(event.at)} event={event.kind}{who} text={text}"


def _or_dash(value: Number) -> str:
    return "-" if value is None else f"{value:.0f}"
