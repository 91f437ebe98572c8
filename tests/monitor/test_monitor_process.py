"""The monitor's process as the launcher starts it: a real one, with its pipes and its sockets."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import pytest
import zmq

from distbelief.chronicle import Begin, End, Event, RunReport, encode
from distbelief.monitor.link import read_link
from distbelief.monitor.simulate import Simulation
from distbelief.param_server.report import ShardReport, WorkerReport
from distbelief.param_server.wire import encode as frame
from tests.helpers.folders import make_run

pytestmark = pytest.mark.integration
SECRET = "0123456789abcdef"


class Process:
    """One, with what it has been told."""

    def __init__(self, folder, **config):
        self.folder = folder
        (folder.logs / "x").parent.mkdir(exist_ok=True)
        self.config = {
            "run": folder.run,
            "run_path": str(folder.path),
            "token": "token",
            "access": SECRET,
            "linger_s": 0.3,
            "log_file": str(folder.logs / "monitor.log"),
            **config,
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "distbelief.monitor.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.tell(json.dumps(self.config).encode() + b"\n")
        assert self.popen.stdout is not None
        self.said = json.loads(self.popen.stdout.readline() or b"null")

    def tell(self, data):
        assert self.popen.stdin is not None
        self.popen.stdin.write(data)
        self.popen.stdin.flush()

    def get(self, path):
        return json.loads(self.text(path))

    def text(self, path):
        url = self.said["url"].partition("?")[0] + path
        request = urllib.request.Request(url, headers={"X-DB-Token": SECRET})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read().decode()

    def until(self, path, is_so, timeout_s=20.0):
        """Ask again and again."""
        deadline = time.monotonic() + timeout_s
        while True:
            data = self.get(path)
            if is_so(data):
                return data
            assert time.monotonic() < deadline, data
            time.sleep(0.05)

    def end(self):
        """Close its standard input. Returns: (exit code, what else it said)."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        return self.popen.wait(20), self.popen.stdout.read()


@contextmanager
def monitor(folder, **config):
    process = Process(folder, **config)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()
        for pipe in (process.popen.stdin, process.popen.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path, "aa")


def messages(seconds, **options):
    """A run's messages, told as of now."""
    start = time.time() - seconds
    options = {"num_workers": 4, "num_shards": 2, "run": "aa", "token": "token", **options}
    yield from Simulation(seed=1, start=start, **options).until(float(seconds))


@contextmanager
def feed(endpoint):
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 1000)
    try:
        socket.connect(endpoint)
        yield socket
    finally:
        socket.close()
        context.term()


def play(process, socket, seconds=10, **options):
    for message in messages(seconds, **options):
        if isinstance(message, WorkerReport | ShardReport):
            socket.send(frame(message))
        else:
            process.tell(encode(message))


def test_it_serves_what_it_is_told_and_ends_when_the_launcher_is_gone(folder):
    with monitor(folder) as process:
        assert process.said["pid"] == process.popen.pid
        link = read_link(folder.path)
        assert link is not None
        assert (link.url, link.feed) == (process.said["url"], process.said["feed"])
        assert link.is_alive
        assert stat.S_IMODE((folder.path / "monitor.json").stat().st_mode) == 0o600
        with feed(process.said["feed"]) as socket:
            play(process, socket)
            # What the launcher and the workers tell comes by two ways.
            meta = process.until(
                "api/v1/meta", lambda m: len(m["worker_order"]) == 4 and m["state"] == "training"
            )
        assert (meta["run"], meta["live"]) == ("aa", True)
        snapshot = process.until("api/v1/snapshot", lambda s: s["kpi"]["staleness"]["n"])
        assert snapshot["kpi"]["workers"]["target"] == 4
        assert "distbelief_updates_total" in process.text("metrics")
        process.tell(encode(End(at=time.time(), result={"exit": "done"})))
        process.until("api/v1/meta", lambda m: m["finished"])
        code, more = process.end()
    assert (code, more) == (0, b"")
    assert read_link(folder.path) is None
    assert (folder.path / "metrics" / "meta.json").is_file()


def test_what_it_recorded_is_shown_again(folder):
    with monitor(folder) as process, feed(process.said["feed"]) as socket:
        play(process, socket)
        process.until("api/v1/snapshot", lambda s: s["kpi"]["staleness"]["n"])
        process.tell(encode(Event(at=time.time(), kind="crash", who="w1", text="killed")))
        process.tell(encode(End(at=time.time(), result={"exit": "done"})))
        process.until("api/v1/meta", lambda m: m["finished"])
        seq = process.get("api/v1/meta")["seq"]
        process.until("api/v1/meta", lambda m: m["seq"] > seq + 1)  # all reports are in
        workers = process.get("api/v1/workers?sort=id")["items"]
        assert process.end()[0] == 0
    with monitor(folder, replay=True) as process:
        meta = process.get("api/v1/meta")
        assert (meta["run"], meta["live"], meta["exit"]) == ("aa", False, "done")
        again = process.get("api/v1/workers?sort=id")["items"]
        assert [w["id"] for w in again] == [w["id"] for w in workers]
        assert [w["pushes"] for w in again] == [w["pushes"] for w in workers]
        texts = [e["text"] for e in process.get("api/v1/events")["items"]]
        assert "killed" in texts
        assert read_link(folder.path) is None, "nobody reports to it"
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0


def test_junk_in_its_input_is_passed_over(folder):
    with monitor(folder) as process:
        process.tell(b"\n{}\n[[[[\n\xff\xfe\n" + b'{"type":"Begin"}\n' + b"[" * 100_000 + b"\n")
        process.tell(b"x" * (5 * 2**20) + b"\n")
        play_run(process)
        process.until("api/v1/meta", lambda m: m["run"] == "aa")
        assert process.end()[0] == 0
    assert "no chronicle" in (folder.logs / "monitor.log").read_text()


def play_run(process):
    for message in messages(2):
        if isinstance(message, Begin | RunReport):
            process.tell(encode(message))


def test_reports_of_others_and_junk_at_its_socket_change_nothing(folder):
    with monitor(folder) as process, feed(process.said["feed"]) as socket:
        play_run(process)
        for data in (b"", b"junk", b"\xff" * 1000):
            socket.send(data)
        for message in messages(3, token="wrong"):
            if isinstance(message, WorkerReport):
                socket.send(frame(message))
        for message in messages(3, run="bb"):
            if isinstance(message, WorkerReport):
                socket.send(frame(message))
        play(process, socket, 5, num_workers=2)
        meta = process.until("api/v1/meta", lambda m: len(m["worker_order"]) >= 2)
        assert set(meta["worker_order"]) <= {"w0", "w1", "w2", "w3"}
        process.until("api/v1/snapshot", lambda s: s["kpi"]["staleness"]["n"])


def test_one_that_was_stopped_says_so_when_it_goes_on(folder):
    with monitor(folder) as process:
        play_run(process)
        process.until("api/v1/meta", lambda m: m["run"] == "aa")
        os.kill(process.popen.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(process.popen.pid, signal.SIGCONT)
        found = process.until(
            "api/v1/events?q=stopped", lambda e: any("was stopped" in i["text"] for i in e["items"])
        )
        assert found["items"][-1]["who"] == ""


def test_killed_and_started_again_it_has_the_same_port_and_what_was_recorded(folder):
    with monitor(folder) as process:
        play_run(process)
        process.until("api/v1/meta", lambda m: m["run"] == "aa")
        url, dead = process.said["url"], read_link(folder.path)
        process.popen.kill()
        process.popen.wait()
    assert dead is not None
    assert not dead.is_alive
    port = int(url.partition("?")[0].rstrip("/").rpartition(":")[2])
    with monitor(folder, wish=port) as process:
        assert process.said["url"] == url
        link = read_link(folder.path)
        assert link is not None
        assert link.pid == process.popen.pid


@pytest.mark.parametrize(
    ("config", "code", "exit_code"),
    [
        ({"host": "192.0.2.1"}, "DB-ENV-005", 3),
        ({"feed_host": "192.0.2.1"}, "DB-ENV-005", 3),
        ({"access": "", "host": "0.0.0.0"}, "DB-ENV-008", 3),
        ({"access": "", "actions": True}, "DB-ENV-008", 3),
        ({"hosts": ["http://x/"]}, "DB-ENV-008", 3),
        ({"replay": True}, "DB-RUN-017", 1),
        ({"port": "x"}, "DB-BUG-001", 1),
    ],
)
def test_why_it_cannot_serve_is_its_one_line(folder, config, code, exit_code):
    with monitor(folder, **config) as process:
        assert process.said["error"]["code"] == code
        assert process.said["error"]["what"]
        assert process.popen.wait(20) == exit_code
    assert read_link(folder.path) is None


def test_it_needs_the_secret(folder):
    with monitor(folder) as process:
        url = process.said["url"].partition("?")[0] + "api/v1/meta"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url, timeout=20)
        caught.value.close()
        assert caught.value.code == 401
        assert process.said["url"].endswith(f"?k={SECRET}")


def test_it_loads_neither_torch_nor_a_terminal():
    script = (
        "import sys, distbelief.monitor.process; "
        "print([n for n in ('torch', 'ray', 'click', 'rich', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n"
