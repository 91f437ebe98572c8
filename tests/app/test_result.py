"""What a run tells: the live line, problems, and the record in result.json."""

import io
import json

import pytest

from distbelief.live import LiveLine
from distbelief.problem import EXIT_OF, Problem
from distbelief.result import Result

SCHEMA = {
    "type", "v", "run", "run_dir", "engine", "workers", "shards", "samples", "updates",
    "train_loss", "eval", "staleness", "samples_per_s", "train_s", "wall_s", "exit", "error",
}  # fmt: skip


def result(**more) -> Result:
    return Result(run="r", run_dir="runs/r", engine="local", workers=2, shards=1, **more)


def test_the_record_has_every_key_of_its_schema():
    record = json.loads(result().to_json())
    assert set(record) >= SCHEMA
    assert (record["type"], record["v"]) == ("result", 1)
    assert set(record["staleness"]) == {"p50", "p95", "max"}
    assert record["eval"] is None
    assert record["error"] is None


def test_a_run_that_was_not_ended_well_counts_as_failed():
    assert json.loads(result().to_json())["exit"] == "failed"


def test_the_record_is_one_line():
    text = result(error={"code": "DB-RUN-009", "text": "two\nlines"}).to_json()
    assert "\n" not in text
    assert json.loads(text)["error"]["text"] == "two\nlines"


def test_the_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    result(exit="stopped").write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    broken = result(exit="done")
    broken.error = {"code": object()}  # type: ignore[dict-item]  # on purpose
    with pytest.raises(TypeError):
        broken.write(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["exit"] == "stopped"
    result(exit="done").write(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["exit"] == "done"


def test_a_problem_says_what_why_and_what_to_do():
    problem = Problem("DB-ENV-001", "Ray is not there", why="line 1\nline 2", fix="install it")
    assert str(problem) == (
        "error[DB-ENV-001]: Ray is not there\n  why   line 1\n        line 2\n  try   install it"
    )
    assert problem.exit_code == 3
    assert str(Problem("DB-RUN-001", "gone")) == "error[DB-RUN-001]: gone"


@pytest.mark.parametrize("family", EXIT_OF)
def test_every_family_of_problems_has_an_exit_code(family):
    assert Problem(f"{family}-007", "x").exit_code in (1, 2, 3, 5)


def test_an_event_has_a_line_of_its_own_without_markup():
    out = io.StringIO()
    with LiveLine(out, plain=False) as line:  # not a terminal: plain all the same
        line.say("worker w0 is lost [killed by signal 9], " + "x" * 200)
    assert out.getvalue() == "worker w0 is lost [killed by signal 9], " + "x" * 200 + "\n"
