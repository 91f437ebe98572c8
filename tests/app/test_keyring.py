"""Keyring: who is told which key, and keys in files."""

import json
import os
import stat

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.folder import RunFolder
from distbelief.keyring import LAUNCHER, MONITOR, SERVER, Keyring, read_pair, write_pair
from distbelief.param_server.curve import Pair
from distbelief.problem import Problem

WORKERS, SHARDS = ["w0", "w1"], ["shard0", "shard1"]


def test_servers_list_those_who_speak_to_them_and_nobody_else():
    ring = Keyring(WORKERS, SHARDS)
    assert sorted(ring.of("shard0").names.values()) == ["launcher", "w0", "w1"]
    assert sorted(ring.of(LAUNCHER).names.values()) == ["shard0", "shard1", "w0", "w1"]
    for name, public in ring.listed.items():
        if name in WORKERS:
            assert ring.of("shard0").names[public] == ring.of(LAUNCHER).names[public] == name


def test_a_worker_is_told_no_secret_but_its_own():
    ring = Keyring(WORKERS, SHARDS)
    keys = ring.of("w0")
    assert (keys.serving, keys.names) == (None, {})
    own = keys.mine.secret
    others = {ring.of(name).mine.secret for name in ("w1", *SHARDS, LAUNCHER)}
    assert own not in others
    assert keys.server == ring.listed[SERVER]
    assert Pair.of(own).public == ring.listed["w0"]


def test_every_start_has_other_keys():
    one, two = Keyring(WORKERS, SHARDS).listed, Keyring(WORKERS, SHARDS).listed
    assert one.keys() == two.keys()
    assert set(one.values()).isdisjoint(two.values())


def test_keys_of_a_folder_are_used_by_their_names(tmp_path):
    server, w1 = write_pair(tmp_path, SERVER), write_pair(tmp_path, "w1")
    ring = Keyring(WORKERS, SHARDS, tmp_path)
    assert ring.of("w1").mine == w1
    assert ring.of("w0").server == server.public
    assert ring.of("shard1").serving == server.secret
    assert ring.of("w0").mine != Keyring(WORKERS, SHARDS, tmp_path).of("w0").mine


def test_a_folder_without_the_servers_key_is_refused(tmp_path):
    with pytest.raises(Problem, match=r"server\.secret is not there"):
        Keyring(WORKERS, SHARDS, tmp_path)


def test_a_secret_is_its_owners_from_its_first_byte(tmp_path):
    before = os.umask(0)
    try:
        pair = write_pair(tmp_path / "deep" / "keys", "w0")
    finally:
        os.umask(before)
    folder = tmp_path / "deep" / "keys"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "w0.secret").stat().st_mode) == 0o600
    assert (folder / "w0.public").read_text() == pair.public + "\n"
    assert read_pair(folder, "w0") == pair


@pytest.mark.parametrize("there", ["w0.secret", "w0.public"])
def test_nothing_is_written_over_nor_through_a_link(tmp_path, there):
    elsewhere = tmp_path / "elsewhere"
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / there).symlink_to(elsewhere)
    with pytest.raises(Problem) as caught:
        write_pair(keys, "w0")
    assert caught.value.code == "DB-KEY-001"
    assert not elsewhere.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_may_read_is_refused(tmp_path, mode):
    write_pair(tmp_path, "w0")
    (tmp_path / "w0.secret").chmod(mode)
    with pytest.raises(Problem, match=f"its mode is {mode:04o}"):
        read_pair(tmp_path, "w0")


@pytest.mark.parametrize("text", ["", "short", "x" * 39 + "é", "\0" * 40, "y" * 4000])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, text):
    write_pair(tmp_path, "w0")
    (tmp_path / "w0.secret").write_text(text)
    with pytest.raises(Problem, match="not a key") as caught:
        read_pair(tmp_path, "w0")
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize("name", ["../w0", "/w0", "w/0", "W0", "", ".", "..", "w0\n", "w" * 65])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    for use in (write_pair, read_pair):
        with pytest.raises(Problem, match="is no name of a key"):
            use(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_keys_and_shows_the_public_ones(tmp_path):
    folder = tmp_path / "keys"
    done = CliRunner().invoke(cli, ["keys", "new", str(folder), "server", "w0", "--json"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.output.splitlines()]
    assert {row["name"]: row["public"] for row in rows} == {
        name: read_pair(folder, name).public for name in ("server", "w0")
    }
    assert read_pair(folder, "w0").secret.encode().decode() not in done.output
    again = CliRunner().invoke(cli, ["keys", "new", str(folder)])
    assert again.exit_code == 3
    assert "error[DB-KEY-001]" in again.output


def test_the_command_shows_whom_a_run_lets_in(tmp_path):
    folder = RunFolder.make(tmp_path, "20261123-0012")
    folder.config.write_text("")
    ring = Keyring(WORKERS, SHARDS)
    folder.write_keys(ring.listed)
    ask = ["keys", "list", "0012", "--run-dir", str(tmp_path)]
    done = CliRunner().invoke(cli, ask)
    assert [line.split() for line in done.output.splitlines()] == [
        [name, public] for name, public in ring.listed.items()
    ]
    folder.write_keys(None)  # the run went on in the clear
    done = CliRunner().invoke(cli, ask)
    assert done.exit_code == 3
    assert "error[DB-KEY-003]" in done.output


@pytest.mark.parametrize(
    ("net", "listed", "said"),
    [
        ("", None, None),
        ('host = "10.0.0.5"\ninsecure = true', None, "NOT ENCRYPTED at 10.0.0.5 (net.insecure)"),
        ('host = "10.0.0.5"', {"server": "x", "w0": "y"}, "encrypted at 10.0.0.5, 1 processes"),
    ],
)
def test_status_says_plainly_whether_a_run_is_encrypted(tmp_path, net, listed, said):
    folder = RunFolder.make(tmp_path, "20261123-0012")
    folder.config.write_text(f"[net]\n{net}\n")
    folder.write_keys(listed)
    done = CliRunner().invoke(cli, ["status", "0012", "--run-dir", str(tmp_path)])
    if said is None:
        assert "crypt" not in done.output.lower()
    else:
        assert said in done.output


def test_the_monitor_hears_workers_and_shards_and_speaks_to_nobody():
    ring = Keyring(WORKERS, SHARDS)
    keys = ring.of(MONITOR)
    assert sorted(keys.names.values()) == ["shard0", "shard1", "w0", "w1"]
    assert keys.serving == ring.of("shard0").serving
    assert "monitor" not in ring.of("shard0").names.values()
    assert "monitor" not in ring.of(LAUNCHER).names.values()
