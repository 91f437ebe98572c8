"""Process: how a worker or shard tells its end, whatever the words are."""

import pytest

from distbelief.controller.machine import Controller
from distbelief.job import Job
from distbelief.param_server.errors import ShardUnavailable
from distbelief.problem import Problem
from distbelief.process import _run_told
from distbelief.spec import Spec
from distbelief.workers.lease import LeaseQueue
from distbelief.workers.worker import NonFiniteLoss
from tests.workers.jobs import RUN, TOKEN, control_of

SPEC = Spec(
    role="worker",
    index=3,
    inc=1,
    run=RUN,
    token=TOKEN,
    controller="controller",
    job=Job().to_json(),
    run_path=".",
    cwd=".",
)


def told(monkeypatch, error: Exception | None) -> tuple[str, str]:
    """What the controller hears of a worker that ends like this."""

    def be_the_worker(*_):
        if error is not None:
            raise error
        return False

    monkeypatch.setattr("distbelief.process._run_worker", be_the_worker)
    controller = Controller(RUN, TOKEN, LeaseQueue(1, 1), 1)
    _run_told(SPEC, Job(), control_of(controller), None)  # type: ignore[arg-type]  # not used
    if isinstance(error, Problem):
        assert controller.explained["w3"] == (error.why, error.fix)
    return controller.ended["w3"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (None, "", ""),
        (NonFiniteLoss("w3: the loss is nan"), "DB-TRAIN-001", "w3: the loss is nan"),
        (ShardUnavailable("shard 0 is silent"), "DB-RUN-001", "shard 0 is silent"),
        (KeyError("layer"), "DB-TRAIN-002", "KeyError: 'layer'"),
        (Problem("DB-MODEL-001", "what", why="why", fix="fix"), "DB-MODEL-001", "what"),
    ],
)
def test_the_controller_hears_how_a_process_ended(monkeypatch, error, code, text):
    assert told(monkeypatch, error) == (code, text)


@pytest.mark.parametrize(
    "words",
    ["Größe passt nicht " * 400, "错误" * 2000, "\udcff broken name"],
    ids=["long", "wide", "no UTF-8"],
)
def test_an_error_in_any_language_is_heard(monkeypatch, words):
    code, text = told(monkeypatch, ValueError(words))
    assert code == "DB-TRAIN-002"
    assert text.startswith("ValueError: " + words[:20].replace("\udcff", "?"))


def test_a_spec_survives_its_json_form_and_hides_its_token():
    assert Spec.from_json(SPEC.to_json()) == SPEC
    assert TOKEN not in repr(SPEC)
    assert SPEC.name == "w3"
