"""doctor: what it finds here, and what it says of machines that are not ready."""

import errno
import json
import resource
import socket
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from distbelief import doctor
from distbelief.cli import cli
from distbelief.doctor import BAD, OK, WARN, Check

GIB = 2**30


@pytest.fixture(autouse=True)
def _home_without_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Without the two that import torch and Ray in other processes."""
    monkeypatch.setattr(doctor, "look_at_torch", lambda: Check("torch", OK, "2.6"))
    monkeypatch.setattr(doctor, "look_at_ray", lambda: Check("ray", WARN, "not installed", "pip"))


def test_here_everything_is_looked_at_in_seconds():
    began = time.monotonic()
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    record = json.loads(done.output)
    assert (record["type"], record["v"]) == ("doctor", 1)
    found = {check["name"]: check for check in record["checks"]}
    assert set(found) == {
        "python", "torch", "ray", "libraries", "encryption", "files", "memory", "run folder",
        "ports", "host name", "clock", "loopback", "limits",
    }  # fmt: skip
    assert record["ok"] is True
    assert done.exit_code == 0
    assert found["torch"]["level"] == OK
    assert found["ray"]["level"] == OK
    assert "works with click" in found["ray"]["text"]
    assert "CURVE" in found["encryption"]["text"]
    assert time.monotonic() - began < doctor.CHILD_S


def test_a_person_gets_marks_and_what_to_do(quick, tmp_path):
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert "! ray        not installed\n             try pip\n" in done.output
    assert "✓ python" in done.output
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_folder_that_cannot_be_written_is_exit_code_3(quick, tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli, ["doctor", "--run-dir", "/proc/1/none"])
    assert done.exit_code == 3
    assert "✗ run folder" in done.output
    assert "try mend its permissions" in done.output


def test_a_port_of_the_settings_that_is_taken_is_exit_code_3(quick):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = CliRunner().invoke(cli, ["doctor"], env={"DISTBELIEF_NET__PORT": str(port)})
    assert done.exit_code == 3
    assert f"✗ ports      taken at 127.0.0.1: {port}" in done.output


def test_a_check_that_fails_itself_does_not_hide_the_others(quick, monkeypatch):
    def fail():
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "look_at_name", fail)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert "! doctor     a check failed: RuntimeError: odd" in done.output
    assert "✓ clock" in done.output


JUDGED = [
    (doctor.judge_python((3, 10, 1)), BAD, "3.11 or newer"),
    (doctor.judge_torch(None, "no module"), BAD, "no module"),
    (doctor.judge_torch(["2.5.1", []], ""), BAD, "too old"),
    (doctor.judge_torch(["2.6.0", ["H100"]], ""), OK, "CUDA: H100"),
    (doctor.judge_ray(None, "", ""), WARN, "not installed"),
    (doctor.judge_ray("2.44.0", "Sentinel", "8.3"), WARN, "2.44.0 with click 8.3"),
    (doctor.judge_ray("2.1.0", "", "8.1"), WARN, "too old"),
    (doctor.judge_libraries({"pyzmq": None, "click": "8.1"}), BAD, "missing: pyzmq"),
    (doctor.judge_libraries({"pyzmq": "25.1", "click": "8.1"}), BAD, "too old: pyzmq 25.1"),
    (doctor.judge_curve("4.3.5", False), WARN, "no CURVE"),
    (doctor.judge_files(256, 1024), WARN, "enough for 412 workers"),
    (doctor.judge_files(256, resource.RLIM_INFINITY), OK, "any number"),
    (doctor.judge_shared_memory(False, "denied", GIB), WARN, "denied"),
    (doctor.judge_shared_memory(True, "", 64 * 2**20), WARN, "64 MiB"),
    (doctor.judge_folder(Path("runs"), "", 2**20, 0.1), WARN, "1 MiB free"),
    (doctor.judge_ports("::1", {8787: False}), WARN, "8787 is taken"),
    (doctor.judge_name("vm", [], "unknown"), WARN, "vm has no address"),
    (doctor.judge_clock(0.2, 1.8e9), WARN, "+200 ms"),
    (doctor.judge_clock(0.0, 1e6), WARN, "1970"),
    (doctor.judge_loopback(1e8), WARN, "0.1 GB/s"),
    (doctor.judge_limits({"cpus": 0.5}, 8), WARN, "0.5 may be used"),
    (doctor.judge_limits({"memory": float(GIB)}, 8), WARN, "1.0 GiB"),
    (doctor.judge_limits({"cpus": 4.0, "memory": 8.0 * GIB}, 8), OK, "8 cores"),
]


@pytest.mark.parametrize(("check", "level", "text"), JUDGED)
def test_what_is_found_is_judged_and_what_is_not_well_has_a_fix(check, level, text):
    assert check.level == level
    assert text in check.text
    assert bool(check.fix) == (level != OK)


def test_limits_of_a_container_are_read(tmp_path):
    assert doctor.read_limits(tmp_path) == {}
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.read_limits(tmp_path) == {"cpus": 1.5}
    (tmp_path / "memory.max").write_text("4294967296\n")
    assert doctor.read_limits(tmp_path)["memory"] == 4 * GIB


def test_an_address_of_others_is_no_free_port():
    with pytest.raises(OSError, match="assign") as caught:
        doctor.is_free("203.0.113.7", 8787)
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_a_library_that_breaks_at_its_import_says_how():
    told, why = doctor.in_child("raise ValueError('broken')")
    assert (told, why) == (None, "ValueError: broken")
    assert doctor.in_child("print(json.dumps([1]))") == ([1], "")


def test_without_ray_it_says_so(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    assert doctor.look_at_ray().text == "not installed"
