"""A run as the monitor tells of it, from its own simulation: four workers, of which one is slow."""

from functools import cache

import msgspec

from distbelief.monitor.scene import scene
from distbelief.monitor.store import Store
from distbelief.sight import Events, Meta, Page, Sight, Snapshot

URL = "http://127.0.0.1:8787/?k=4d1c"


@cache
def store() -> Store:
    made = Store(actions=False, live=True)
    simulation = scene(4, 0, 1_800_000_000.0, 240.0)
    for second in range(1, 240):
        for message in simulation.until(float(second)):
            made.take(message, message.at)
        made.advance(1_800_000_000.0 + second)
    return made


@cache
def watched() -> Sight:
    """As the terminal gets it: through JSON."""

    def told(data, shape):
        return msgspec.json.decode(msgspec.json.encode(data), type=shape)

    source = store()
    snapshot = told(source.snapshot(), Snapshot)
    return Sight(
        run="20261122-231032-b834",
        state="training",
        name=told(source.meta(), Meta).name,
        kpi=snapshot.kpi,
        seq=snapshot.seq,
        t=snapshot.t,
        age_s=snapshot.age_s,
        findings=snapshot.findings,
        shards=snapshot.shards,
        page=told(source.workers(), Page),
        events=told(source.events(), Events).items[-4:],
        url=URL,
    )
