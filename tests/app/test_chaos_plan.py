import pytest

from distbelief.chaos.plan import FaultKind, Plan, default_plan
from distbelief.problem import Problem

PLAN = """
seconds = 20
seed = 3

[[fault]]
kind = "kill"
target = "worker"
every_s = 2.5
spaced = true

[[fault]]
kind = "pause"
for_s = [0.2, 15]
"""


@pytest.fixture
def plan_of(tmp_path):
    def read(text):
        (tmp_path / "faults.toml").write_text(text)
        return Plan.from_toml(tmp_path / "faults.toml")

    return read


def test_a_plan_is_read_from_toml(plan_of):
    assert plan_of(PLAN) == Plan(
        seconds=20,
        seed=3,
        faults=(
            FaultKind(kind="kill", target="worker", every_s=2.5, spaced=True),
            FaultKind(kind="pause", for_s=0.2, for_max_s=15),
        ),
    )


def test_the_same_seed_makes_the_same_faults(plan_of):
    plan = plan_of(PLAN)
    faults = list(plan.schedule())
    assert faults == list(plan.schedule())
    assert faults != list(Plan(seconds=20, seed=4, faults=plan.faults).schedule())
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)


def test_faults_come_as_often_as_said_and_leave_the_end_quiet():
    faults = list(default_plan(spaced=True, seconds=606).schedule())
    shards = [fault for fault in faults if fault.kind.target == "shard"]
    assert len(shards) == pytest.approx(600, rel=0.1)
    assert len(faults) - len(shards) == pytest.approx(200, rel=0.1)
    assert max(fault.at_s for fault in faults) < 600


def test_a_range_of_lengths_is_drawn_from(plan_of):
    pauses = [fault.for_s for fault in plan_of(PLAN).schedule() if fault.kind.kind == "pause"]
    assert all(0.2 <= for_s <= 15 for for_s in pauses)
    assert max(pauses) > 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[fault]]\nkind = "flood"', "kind 'flood' is none of kill, pause"),
        ('[[fault]]\nkind = "cut"\ntarget = "worker"', "a cut is of a shard, not of 'worker'"),
        ('[[fault]]\nkind = "cut"\ndirection = "up"', "direction 'up' is none of both"),
        ('[[fault]]\nkind = "kill"\nevery = 2', "a fault has no every"),
        ('[[fault]]\nkind = "kill"\nevery_s = 0', "every_s must be above 0"),
        ("secs = 3", "secs"),
        ("seconds = ", "faults.toml"),
    ],
)
def test_a_plan_that_is_none_is_told(text, said, plan_of):
    with pytest.raises(Problem) as caught:
        plan_of(text)
    assert caught.value.code == "DB-USE-002"
    assert said in caught.value.what
