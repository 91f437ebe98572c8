"""Scene: a run that never was, to look at: a straggler, a crash, a slow node and a busy shard."""

from distbelief.monitor.simulate import Fault, Simulation, straggler

NODE = 8
"""Workers on one."""
BUSY = 256_000
"""Reports of workers that are played before one may look: half a minute of computing."""


def history_s(num_workers: int) -> float:
    """How much of a past there is: 15 minutes, and less in large fleets."""
    return float(max(60, min(900, BUSY // num_workers)))


def scene(num_workers: int, seed: int, start: float, past_s: float) -> Simulation:
    """start: unix time at which it begins. past_s: until now; all happens within it."""
    last = num_workers - 1
    slow, dies, late = (f"w{min(i, last)}" for i in (17, 42, 63))
    faults = [straggler(slow, 6.0, 0.6 * past_s)]
    if num_workers >= 3:
        faults.append(Fault(kind="crash", who=dies, start=0.3 * past_s, end=0.3 * past_s + 40))
    if num_workers >= 4 * NODE:
        name = f"w{NODE * 2}"
        faults.append(straggler("node-3", 9.0, 0.4 * past_s, 0.5 * past_s, "fetch"))
        faults.append(straggler(name, 8.0, 0.2 * past_s, 0.3 * past_s, "data"))
        faults.append(Fault(kind="late", who=late, start=0.1 * past_s))
    return Simulation(
        num_workers,
        4 if num_workers > 8 else 2,
        per_node=NODE,
        faults=faults,
        seed=seed,
        start=start,
        meter=0.02,
        minutes=past_s / 60 + 45,
    )
