"""Solo: a script that was started by itself trains in one process, over the shard's own rules."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import distbelief
from distbelief.solo import Solo
from distbelief.workers import session
from tests.helpers.solo import Script, linear
from tests.workers.jobs import batches, contract_of, flat
from tests.workers.test_downpour_script import train


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    session.set_current(None)
    yield
    session.set_current(None)


def test_a_script_without_a_launcher_is_alone():
    here = session.current()
    assert isinstance(here, Solo)
    assert session.current() is here
    assert distbelief.worker() == here.info
    assert (here.info.index, here.info.count, here.is_shared) == (0, 1, False)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"rule": "adam", "clip_part_norm": 0.05},
        {"n_push": 2, "n_fetch": 3, "local_lr": 0.1},
        {"overlap": True},
    ],
)
def test_it_computes_what_one_worker_with_a_launcher_does(options):
    alone, joined = linear(), linear()
    train(distbelief.Downpour(alone.parameters(), lr=0.1, **options), alone, batches(9))
    with Script() as script:
        script.be()
        train(distbelief.Downpour(joined.parameters(), lr=0.1, **options), joined, batches(9))
        assert flat(alone).equal(flat(joined))


def test_the_shard_is_the_one_that_a_process_serves():
    model = linear()
    optimizer = distbelief.Downpour(model.parameters(), lr=0.1)
    train(optimizer, model, batches(5))
    here = session.current()
    assert isinstance(here, Solo)
    assert here._shard is not None
    assert {part.version for part in here._shard.parts.values()} == {5}
    assert optimizer.last_pushed is not None
    assert optimizer.last_pushed.staleness == 0


def test_a_second_downpour_is_refused_as_with_a_launcher():
    here = Solo()
    here.join(contract_of(linear()))
    with pytest.raises(ValueError, match="has a Downpour already"):
        here.join(contract_of(linear()))


def test_alone_there_is_nobody_to_share_with():
    with pytest.raises(AssertionError):
        Solo().iterate()
    with pytest.raises(AssertionError):
        Solo().take(10, 5, 1)


def test_a_model_of_many_parts_trains_alone():
    model = nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 10))
    plain = nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 10))
    plain.load_state_dict(model.state_dict())
    train(distbelief.Downpour(model.parameters(), lr=0.1), model, batches(5, inputs=50))
    train(torch.optim.SGD(plain.parameters(), lr=0.1), plain, batches(5, inputs=50))
    assert flat(model).equal(flat(plain))


@pytest.mark.slow
def test_a_plain_script_needs_no_guard_and_loads_no_cluster(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\n"
        "from distbelief import Downpour, worker\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = Downpour(model.parameters(), lr=0.1)\n"
        "model(torch.ones(1, 2)).sum().backward()\n"
        "optimizer.step()\n"
        "print(worker().index, optimizer.num_answered, 'ray' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "0 1 False\n"
    assert ran.stderr.count("this process trains alone, without servers") == 1
