import json
import os
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.monitor.link import Link
from distbelief.monitor.recording import Recording
from distbelief.monitor.scene import history_s, scene
from tests.helpers.folders import end, make_run
from tests.helpers.watched import Watched


def invoke(*args):
    return CliRunner().invoke(cli, ["dashboard", *map(str, args)])


def test_the_link_of_a_run_that_goes_on_is_printed(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    folder = make_run(tmp_path, "aa")
    Link.of_this_process("http://127.0.0.1:1/?k=x", "tcp://127.0.0.1:2").write(folder.path)
    done = invoke("aa", "--run-dir", tmp_path)
    assert (done.exit_code, done.stdout) == (0, "http://127.0.0.1:1/?k=x\n")
    assert opened == []
    assert invoke("--run-dir", tmp_path, "--open").exit_code == 0
    assert opened == ["http://127.0.0.1:1/?k=x"]


def test_a_run_without_a_recording_is_said_so(tmp_path):
    folder = make_run(tmp_path, "aa")
    end(folder)
    done = invoke("aa", "--run-dir", tmp_path)
    assert done.exit_code == 1
    assert "error[DB-RUN-017]: run aa has no recording" in done.stderr
    assert "why" in done.stderr
    assert "try" in done.stderr


def test_a_run_that_goes_on_with_a_monitor_that_is_gone_is_said_so(tmp_path):
    folder = make_run(tmp_path, "aa")
    replace(Link.of_this_process("http://127.0.0.1:1/", ""), began="1").write(folder.path)
    done = invoke("aa", "--run-dir", tmp_path)
    assert "its monitor is not running" in done.stderr
    assert done.exit_code == 1


def test_there_must_be_a_run(tmp_path):
    done = invoke("--run-dir", tmp_path)
    assert "error[DB-RUN-002]" in done.stderr


def test_an_address_that_is_not_ours_is_an_error(tmp_path):
    done = invoke("--simulate", 4, "--host", "192.0.2.1")
    assert done.exit_code == 3
    assert "error[DB-ENV-005]" in done.stderr


@pytest.mark.parametrize("args", [["--simulate", "0"], ["--port", "70000"], ["--port", "x"]])
def test_flags_that_make_no_sense_are_refused(args):
    assert invoke(*args).exit_code == 2


def test_large_fleets_have_a_shorter_past_and_all_has_its_place_in_it():
    assert history_s(4) == history_s(64) == 900
    assert history_s(10_000) == 60
    simulation = scene(64, 1, 0.0, 900.0)
    assert {fault.kind for fault in simulation.faults} == {"slow", "crash", "late"}
    assert all(0 < fault.start < 900 for fault in simulation.faults)
    assert all(f.who in ("w0", "node-0") for f in scene(1, 1, 0.0, 900.0).faults)


def serve(*args):
    """(the process, its first line)"""
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief", "dashboard", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def meta_of(url):
    address, _, key = url.partition("?k=")
    request = urllib.request.Request(address + "api/v1/meta", headers={"X-DB-Token": key})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def interrupt(process):
    """Ctrl-C. Returns: (exit code, standard error)"""
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


@pytest.mark.integration
def test_a_run_that_has_ended_is_served_until_ctrl_c(tmp_path):
    folder = make_run(tmp_path, "aa")
    end(folder)
    watched = Watched(run="aa")
    Recording(folder.path / "metrics").save(watched.store, watched.now)
    process, url = serve("aa", "--run-dir", tmp_path)
    meta = meta_of(url)
    assert (meta["run"], meta["live"]) == ("aa", False)
    assert meta["worker_order"] == watched.store.meta()["worker_order"]
    code, err = interrupt(process)
    assert code == 0
    assert err == "Ctrl-C ends it\n"


@pytest.mark.integration
def test_a_run_that_never_was_is_served_until_ctrl_c(tmp_path):
    process, url = serve("--simulate", 4, "--seed", 1)
    assert meta_of(url)["state"] in ("waiting", "starting", "training")
    code, err = interrupt(process)
    assert code == 0
    assert "Traceback" not in err
