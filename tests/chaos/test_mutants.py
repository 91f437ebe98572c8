"""The tester tested: each mistake that a server could make is found in a run with faults."""

import os
import sys
from pathlib import Path

import pytest

from distbelief.chaos.plan import FaultKind, Plan
from distbelief.chaos.trial import Trial, our_job

MUTANTS = Path(__file__).parent / "mutants"
FAULTS = (
    FaultKind(kind="kill", target="shard", every_s=1.0),
    FaultKind(kind="kill", target="worker", every_s=3.0),
    FaultKind(kind="drop", target="shard", every_s=1.0, for_s=0.05),
    FaultKind(kind="lose", target="shard", every_s=0.5),
)
"""Kills alone bring neither repetitions nor holes: the clients see to that."""


def verdict_of(mutant, folder, faults=FAULTS):
    seconds = float(os.environ.get("DISTBELIEF_TEST_CHAOS_S", "10"))
    trial = Trial(
        our_job("local"),
        Plan(seconds=seconds, faults=faults),
        folder,
        has_gradients=True,
        say=print,
        environ={"PYTHONPATH": str(MUTANTS), "DISTBELIEF_TEST_MUTANT": mutant},
    )
    return trial.run()


@pytest.mark.long
@pytest.mark.parametrize(
    "mutant",
    [
        "no_dedup",
        "no_gap_check",
        "ack_before_apply",
        "table_apart",
        "durable_before_fsync",
        "epoch_not_raised",
    ],
)
def test_a_mistake_is_found(mutant, tmp_path):
    verdict = verdict_of(mutant, tmp_path)
    sys.stdout.write("\n".join(verdict.violations))
    assert verdict.violations


@pytest.mark.long
def test_a_power_cut_with_every_kill_loses_nothing_that_was_saved(tmp_path):
    verdict = verdict_of("power", tmp_path, FAULTS[:3])
    assert verdict.violations == []
    assert verdict.undone
