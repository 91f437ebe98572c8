"""A whole run with keys: it trains as others do, and its secrets are nowhere to be seen."""

import logging
import time
from pathlib import Path

import zmq

from distbelief.folder import RunFolder
from distbelief.job import Job
from distbelief.keyring import SERVER, keyring_of, write_pair
from distbelief.launcher import launch, resume
from distbelief.param_server.curve import Keys, Pair, knock
from tests.helpers.runs import KillOnce, Watch, tiny_job
from tests.helpers.secrets import Secrets

PORT = 31500


class Knock(Watch):
    """Knocks once at the controller and both shards, while the run trains."""

    def __init__(self, server: str) -> None:
        super().__init__(self.knock)
        self.events: dict[str, int | None] = {}
        self.server = server

    def knock(self, progress):
        if self.events or not progress.samples:
            return
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = Keys(mine=Pair.new(), server=self.server)
        for index in range(3):
            where = f"tcp://127.0.0.1:{PORT + index}"
            self.events[f"stranger {index}"] = knock(context, where, stranger)
            self.events[f"in the clear {index}"] = knock(context, where, None)
        context.term()


def test_an_encrypted_run_trains_lets_nobody_in_and_shows_no_secret(
    user_folder, monkeypatch, caplog, capfd
):
    """Over TCP with a shard that is lost, then resumed in shared memory with a key of our own."""
    caplog.set_level(logging.DEBUG)
    runs = user_folder / "runs"
    secrets = Secrets(monkeypatch)
    kill = KillOnce(runs, "shard1", after_samples=300)
    looked_at = [0.0]

    def look(progress):
        kill(progress)
        if time.monotonic() - looked_at[0] > 0.2:
            secrets.look_at_processes(runs)
            looked_at[0] = time.monotonic()

    watch = Watch(look)
    changes = {
        "net.encrypt": True,
        "net.shared_memory": False,
        "until": "1-epochs",
        "model.factory": "tiny:Slow",
        "train.lr": 0.01,
    }
    result = launch(tiny_job(runs, **changes), live=watch)
    assert (result.exit, result.error, result.shard_restarts) == ("done", None, 1)
    assert result.samples == 1437
    assert any("encrypted, by keys of this run" in text for text in watch.said)
    (path,) = runs.iterdir()
    folder = RunFolder(path)
    listed = folder.keys
    assert listed is not None
    assert list(listed) == ["server", "w0", "w1", "shard0", "shard1", "launcher", "monitor"]

    pair = write_pair(user_folder / "keys", SERVER)
    changes |= {"until": "2-epochs", "net.keys": "keys", "net.port": PORT}
    changes["net.shared_memory"] = True
    visitor = Knock(pair.public)
    again = resume(folder, tiny_job(runs, **changes), live=visitor)
    assert (again.exit, again.error, again.samples) == ("done", None, 2 * 1437)
    assert folder.keys is not None
    assert folder.keys["server"] == pair.public
    assert "served over TCP" not in (folder.logs / "shard0.log").read_text()
    for index in range(3):
        assert visitor.events[f"stranger {index}"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        assert visitor.events[f"in the clear {index}"] in (
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
        )

    one, two = secrets.starts
    assert len(one) == len(two) == 7
    assert one.isdisjoint(two)
    assert len(secrets.known) == 16  # and a token each
    assert {"w0", "w1", "shard0", "shard1"} <= secrets.seen
    assert secrets.look_at_files(path) > 10
    secrets.look_at("log", caplog.text)
    secrets.look_at("output", "".join(capfd.readouterr()))
    secrets.look_at("what was said", "\n".join(watch.said + visitor.said))
    assert secrets.found == []


def test_the_look_for_secrets_finds_them(tmp_path, monkeypatch):
    secrets = Secrets(monkeypatch)
    secrets.known.append(b"--mean-secret")
    (tmp_path / "leak.log").write_text("token=--mean-secret")
    secrets.look_at_files(tmp_path)
    monkeypatch.setattr("tests.helpers.secrets.descendants", lambda _: ["self"])
    secrets.known.append(max(Path("/proc/self/cmdline").read_bytes().split(b"\0"), key=len))
    secrets.look_at_processes(tmp_path)
    assert [text.partition(" ")[0] for text in secrets.found] == [
        str(tmp_path / "leak.log"),
        "/proc/self/cmdline",
    ]


def test_on_the_loopback_there_are_no_keys_unless_somebody_wants_them():
    assert keyring_of(Job()) is None
    assert keyring_of(tiny_job(Path("runs"), **{"net.encrypt": True})) is not None
