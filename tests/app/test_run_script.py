"""A user's script in a worker: as `python script.py` would run it, and whatever it may do."""

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from distbelief.job import Job, ScriptConfig
from distbelief.param_server.errors import DistBeliefError
from distbelief.problem import Problem
from distbelief.run_script import run_script
from distbelief.spec import Spec
from distbelief.workers import session
from tests.helpers.solo import Script
from tests.workers.jobs import RUN, TOKEN

TRAIN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from distbelief import DataLoader, Downpour, worker

model = nn.Linear(3, 1)
optimizer = Downpour(model.parameters(), lr=0.01)
loader = DataLoader(TensorDataset(torch.randn(20, 3)), batch_size=4, shuffle=True)
def train():
    for inputs, in loader:
        optimizer.zero_grad()
        model(inputs).mean().backward()
        optimizer.step()
"""


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    session.set_current(None)
    yield
    session.set_current(None)


class Runner:
    """Runs scripts as worker w0 of a run in memory."""

    def __init__(self, folder: Path, script: Script) -> None:
        self.folder = folder
        self.script = script

    def __call__(self, text: str, *args: str, name: str = "train.py") -> None:
        path = self.folder / name
        path.write_text(dedent(text))
        spec = Spec(
            role="worker",
            index=0,
            inc=1,
            run=RUN,
            token=TOKEN,
            controller="",
            job="",
            run_path="",
            cwd="",
        )
        job = Job(engine="local", script=ScriptConfig(path=str(path), args=args))
        run_script(spec, replace(job, workers=1), self.script.control(), self.script.transport)

    def problem(self, text: str) -> Problem:
        with pytest.raises(Problem) as problem:
            self(text)
        return problem.value


@pytest.fixture
def run(tmp_path) -> Iterator[Runner]:
    with Script() as script:
        yield Runner(tmp_path, script)


def test_a_script_trains_and_leaves(run, capfd):
    run(TRAIN + "train()\nprint('index', worker().index, 'of', worker().count)")
    assert capfd.readouterr().out == "index 0 of 1\n"
    assert run.script.queue.done_samples == 20
    assert run.script.queue.unfinished_samples == 0
    assert "w0" in run.script.shard._has_left


def test_it_finds_itself_as_python_would_have_it(run, capfd):
    (run.folder / "helper.py").write_text("colour = 'blue'")
    before = sys.argv, list(sys.path), dict(sys.modules)
    run(
        TRAIN + "train()\nimport sys, helper\n"
        "print(sys.argv)\nprint(sys.path[0])\nprint(__name__, __file__, helper.colour)\n"
        "print(sys.modules['__main__'].__dict__ is globals())",
        "--epochs",
        "3",
    )
    path = str(run.folder / "train.py")
    assert capfd.readouterr().out.splitlines() == [
        str([path, "--epochs", "3"]),
        str(run.folder),
        f"__main__ {path} blue",
        "True",
    ]
    assert (sys.argv, sys.path) == before[:2]
    assert sys.modules["__main__"] is before[2]["__main__"]
    sys.modules.pop("helper")


def test_a_guarded_main_runs(run):
    run(TRAIN + "if __name__ == '__main__':\n    train()")
    assert run.script.queue.done_samples == 20


def test_classes_of_the_script_can_be_pickled(run):
    run(TRAIN + "import pickle\nclass Own: pass\npickle.loads(pickle.dumps(Own()))\ntrain()")
    assert run.script.queue.done_samples == 20


@pytest.mark.parametrize(
    "change", ["sys.argv.append('more')", "sys.argv = ['x']", "del sys.argv[1:]"]
)
def test_a_script_may_change_its_arguments(run, change):
    before = list(sys.argv)
    run(TRAIN + f"import sys\n{change}\ntrain()")
    assert sys.argv == before


def test_modules_that_it_puts_on_the_path_are_gone_from_it(run):
    before = list(sys.path)
    run(TRAIN + "import sys\nsys.path = ['/nowhere', *sys.path]\ntrain()")
    assert sys.path == before


def test_an_error_has_the_frames_of_the_script_alone(run, caplog):
    problem = run.problem(TRAIN + "def inner():\n    raise KeyError('colour')\ninner()")
    assert problem.code == "DB-SCRIPT-001"
    assert problem.what == "train.py raised KeyError: 'colour'"
    assert "in inner" in problem.why
    assert "raise KeyError('colour')" in problem.why
    assert "runpy" not in problem.why
    assert f"python {run.folder / 'train.py'}" in problem.fix
    assert "Traceback (most recent call last)" in caplog.text


def test_a_script_that_is_no_python_is_told_where(run):
    problem = run.problem("def :\n")
    assert problem.code == "DB-SCRIPT-001"
    assert problem.what.startswith("train.py raised SyntaxError: invalid syntax")
    assert "line 1" in problem.what


@pytest.mark.parametrize("code", ["3", "'no data'"])
def test_an_exit_code_ends_the_run(run, code):
    problem = run.problem(TRAIN + f"train()\nimport sys\nsys.exit({code})")
    assert problem.code == "DB-SCRIPT-002"
    assert problem.what == f"train.py ended itself with exit code {code.strip(chr(39))}"
    assert "sys.exit" in problem.why


@pytest.mark.parametrize("end", ["sys.exit()", "sys.exit(0)", "raise SystemExit"])
def test_a_script_may_end_early(run, end):
    run(TRAIN + f"import sys\ntrain()\n{end}\nprint('not reached')")
    assert run.script.queue.done_samples == 20


def test_a_script_that_ends_in_the_middle_gives_the_rest_back(run):
    run(TRAIN + "for i, (x,) in enumerate(loader):\n"
        "    optimizer.zero_grad(); model(x).mean().backward(); optimizer.step()\n"
        "    if i == 1: break")  # fmt: skip
    assert run.script.queue.done_samples == 8


def test_without_a_downpour_nothing_is_trained(run):
    problem = run.problem("print('hello')")
    assert problem.code == "DB-SCRIPT-003"
    assert problem.what == "train.py ended without making a Downpour: nothing was trained"
    assert "distbelief.Downpour(model.parameters(), lr=...)" in problem.fix


def test_without_a_step_nothing_is_trained(run):
    problem = run.problem(TRAIN + "for x in loader: pass")
    assert problem.code == "DB-SCRIPT-003"
    assert "without a single optimizer.step()" in problem.what
    assert problem.why == "20 samples were handed to it"


def test_where_others_had_all_of_the_data_a_script_may_end_without_a_step(run, caplog):
    caplog.set_level(logging.INFO)
    run.script.queue.size(20, 100)
    run.script.queue.take("w1")
    run(TRAIN + "train()")
    assert "the other workers had taken all of the data" in caplog.text


@pytest.mark.parametrize(
    "train",
    [
        "train()\nprint('not reached')",
        "try:\n    train()\nexcept SystemExit as end:\n    raise RuntimeError('wrapped') from end",
        "try:\n    train()\nfinally:\n    print('tidied up')",
    ],
)
def test_a_stop_ends_the_script_without_an_error(run, capfd, train):
    run.script.queue.stop()
    run(TRAIN + train)
    assert "not reached" not in capfd.readouterr().out


def test_what_has_accrued_when_a_stop_comes_is_pushed(run):
    text = TRAIN.replace("lr=0.01", "lr=0.01, n_push=4")
    run.script.now = 0.0
    run(text + "import distbelief.workers.session as s\n"
        "from distbelief.workers.control import Halt\n"
        "for i, (x,) in enumerate(loader):\n"
        "    if i == 3:\n"
        "        s.current()._control.ask = lambda note: Halt()\n"
        "        s.current()._clock = lambda: 1e9\n"
        "    optimizer.zero_grad(); model(x).mean().backward(); optimizer.step()\n")  # fmt: skip
    assert run.script.controller.worker_samples["w0"] == 16


def test_an_error_of_ours_goes_on_as_it_is(run):
    with pytest.raises(DistBeliefError, match="no such shard"):
        run(TRAIN + "from distbelief.param_server.errors import DistBeliefError\n"
            "raise DistBeliefError('no such shard')")  # fmt: skip


def test_variables_by_which_others_would_take_it_for_theirs_are_not_passed_on(
    run, monkeypatch, capfd
):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_NTASKS", "PMI_RANK")
    for name in (*names, "SLURM_JOB_ID", "MY_RANK"):
        monkeypatch.setenv(name, "7")
    run(TRAIN + "train()\nimport os\nprint(sorted(k for k, v in os.environ.items() if v == '7'))")
    assert capfd.readouterr().out == "['MY_RANK', 'SLURM_JOB_ID']\n"
    assert not set(names) & set(os.environ)


def test_nothing_of_it_is_left_in_the_process(run):
    run(TRAIN + "train()")
    assert session._session is None


def test_a_script_that_is_not_there_is_told(run, tmp_path):
    spec = Spec(role="worker", index=0, inc=1, run=RUN, token=TOKEN, controller="", job="",
                run_path="", cwd="")  # fmt: skip
    job = Job(engine="local", script=ScriptConfig(path=str(tmp_path / "gone.py")))
    with pytest.raises(Problem, match=r"gone\.py raised FileNotFoundError"):
        run_script(spec, job, run.script.control(), run.script.transport)
