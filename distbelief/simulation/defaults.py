"""Defaults: constants of the machine of docs/simulation.md, for whoever has measured none."""

from distbelief.simulation.constants import Constants

DEFAULTS = Constants(
    shard_gb_per_s={"float32": 4.62, "bfloat16": 3.1, "int8": 1.6, "local": 4.88},
    worker_gb_per_s={"float32": 3.69, "bfloat16": 3.45, "int8": 1.38, "local": 4.87},
    part_us=24.6,
    message_us=94.1,
    tcp_gb_per_s=2.51,
    curve_gb_per_s=0.84,
    round_trip_us=44.1,
    source="the machine of docs/simulation.md",
)
