"""The report: one file with the numbers of the page, which loads and runs nothing else."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import msgspec
import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.monitor import report as report_module
from distbelief.monitor.link import Link
from distbelief.monitor.pages import Pages
from distbelief.monitor.recording import Recording
from distbelief.monitor.report import DETAILED, LISTED, LOG_LINES, Report, _spans
from tests.helpers.folders import end, make_run
from tests.helpers.watched import Watched

EVIL = '</script><img src="http://elsewhere/" onerror="alert(1)">'
PAGES = Pages()


class Parts(HTMLParser):
    """What a browser would load, run and read."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.texts: dict[str, str] = {}
        self.policy = ""
        self._in = ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        loads = [given[name] for name in ("src", "href") if name in given]
        self.loaded += [one for one in loads if not one.startswith(("data:", "#"))]
        self._in = {"style": "style", "script": given.get("id", "script")}.get(tag, "")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in:
            self.texts[self._in] = self.texts.get(self._in, "") + data


def render(watched, log=lambda name, lines: f"{lines} lines of {name}\n"):
    page, policy = Report(PAGES, log, lambda: 1234.5).render(watched.store)
    parts = Parts(page)
    recorded = json.loads(gzip.decompress(base64.b64decode(parts.texts["recorded"])))
    return parts, recorded, policy


def told(answer):
    """As JSON has it."""
    return json.loads(msgspec.json.encode(answer))


@pytest.fixture(scope="module")
def watched():
    one = Watched(6, seconds=30)
    one.happen(EVIL, "crash", "w1")
    return one


def test_it_has_the_answers_that_the_page_would_get(watched):
    _, recorded, _ = render(watched)
    store, answers = watched.store, recorded["answers"]
    assert recorded["made"] == 1234.5
    assert recorded["tick"] == told(store.tick())
    assert answers["snapshot"] == told(store.snapshot())
    assert answers["meta"] == told(store.meta())
    assert answers["workers"] == told(store.workers("id", LISTED))
    assert answers["events"]["items"][-1]["text"] == EVIL
    assert answers["shards"] == told(store.shards())
    assert set(recorded["details"]) == {f"w{i}" for i in range(6)}
    assert recorded["details"]["w3"]["pushes"] == store.worker("w3")["pushes"]
    assert recorded["logs"]["w3"] == f"{LOG_LINES} lines of w3\n"
    (series,) = recorded["series"]  # the run is younger than the shortest span
    assert (
        series["loss"] == told(store.series(["loss"], series["from"], series["to"], 1200))["loss"]
    )
    assert {(one["group"], one["metric"]) for one in recorded["heatmaps"]} == {
        (group, metric) for group in ("node", "worst") for metric in ("ratio", "seconds")
    }
    for one in recorded["heatmaps"]:
        cells = base64.b64decode(one["cells"])
        assert len(cells) == one["head"]["rows"] * one["head"]["cols"]
        assert max(cells) > 1  # some worker was somewhere


def test_it_loads_nothing_and_its_policy_lets_nothing_else_run(watched):
    parts, _, policy = render(watched)
    # Its own button is hidden in a report.
    assert parts.loaded == ["report.html"]
    assert parts.policy == policy
    for name, directive in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(parts.texts[name].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "url(" not in parts.texts["style"]
    assert not re.search(r"^\s*(import|export) ", parts.texts["script"], re.MULTILINE)
    assert set(parts.texts) == {"style", "script", "recorded"}


def test_of_many_workers_the_worst_are_there(watched, monkeypatch):
    monkeypatch.setattr(report_module, "LISTED", 4)
    monkeypatch.setattr(report_module, "DETAILED", 2)
    _, recorded, _ = render(watched)
    worst = [one["id"] for one in watched.store.workers("-ratio", 4)["items"]]
    assert [one["id"] for one in recorded["answers"]["workers"]["items"]] == worst
    assert list(recorded["details"]) == worst[:2]
    assert recorded["answers"]["workers"]["total"] == 6
    assert DETAILED < LISTED


@pytest.mark.parametrize(
    ("meta", "spans"),
    [
        ({"t": 1000.2, "started": 900.5, "ended": None}, [(900, 1002)]),
        (
            {"t": 5000.0, "started": 4000.0, "ended": None},
            [(4000, 5001), (4701, 5001), (4101, 5001)],
        ),
        ({"t": 9000.0, "started": 1000.0, "ended": 1400.0}, [(1000, 1406), (1106, 1406)]),
        ({"t": 1000.0, "started": None, "ended": None}, [(941, 1001)]),
        ({"t": 1000.0, "started": 999.5, "ended": None}, [(991, 1001)]),
    ],
    ids=["young", "older", "over", "nobody came", "just begun"],
)  # fmt: skip
def test_curves_are_of_the_whole_run_and_of_its_newest_parts(meta, spans):
    assert _spans(meta) == spans


# The command


def invoke(*args):
    return CliRunner().invoke(cli, ["report", *map(str, args)])


@pytest.fixture
def recorded_run(tmp_path, watched):
    folder = make_run(tmp_path / "runs", "aa")
    (folder.logs / "w1.log").write_text("it said this\n")
    Recording(folder.path / "metrics").save(watched.store, watched.now)
    end(folder)
    return folder


def test_a_run_that_is_over_is_rendered_from_its_recording(recorded_run, tmp_path, watched):
    path = tmp_path / "out.html"
    done = invoke("aa", "--run-dir", recorded_run.path.parent, "-o", path)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{path} (0.")
    recorded = json.loads(
        gzip.decompress(base64.b64decode(Parts(path.read_bytes()).texts["recorded"]))
    )
    assert recorded["logs"]["w1"] == "it said this\n"
    kept = recorded["answers"]["snapshot"]["kpi"]
    assert kept == told(watched.store.snapshot())["kpi"]
    assert [file.name for file in tmp_path.iterdir()] == ["runs", "out.html"]


def test_its_name_is_that_of_the_run_and_minus_is_standard_output(
    recorded_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert invoke("aa", "--run-dir", "runs").exit_code == 0
    assert (tmp_path / "report-aa.html").stat().st_size > 10_000
    assert invoke("aa", "--run-dir", "runs", "-o", "-").stdout.startswith("<!doctype html>")


def test_a_file_that_cannot_be_written_is_said_so(recorded_run, tmp_path):
    done = invoke("aa", "--run-dir", recorded_run.path.parent, "-o", tmp_path / "no" / "out.html")
    assert done.exit_code == 5
    assert "error[DB-STORE-004]" in done.stderr
    assert "-o" in done.stderr


def test_a_run_without_a_recording_has_no_report(tmp_path):
    folder = make_run(tmp_path, "aa")
    end(folder)
    done = invoke("aa", "--run-dir", tmp_path)
    assert done.exit_code == 1
    assert "error[DB-RUN-017]" in done.stderr


def test_a_monitor_that_does_not_answer_is_told_of(tmp_path, watched, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path, "aa")
    Recording(folder.path / "metrics").save(watched.store, watched.now)
    Link.of_this_process("http://127.0.0.1:1/?k=x", "").write(folder.path)  # nobody is there
    done = invoke("aa", "--run-dir", tmp_path)
    assert done.exit_code == 0
    assert "its monitor does not answer: this is what was recorded" in done.stderr
