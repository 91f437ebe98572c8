"""`distbelief cluster`: what it says and refuses before anything is started."""

import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.cluster.document import parse
from distbelief.cluster.remote import forward, ssh_command
from distbelief.cluster.token_file import ensure


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def onprem(tmp_path: Path, repo_root: Path) -> Path:
    """Ready to be started, on hosts that are none."""
    text = (repo_root / "deploy/ray/onprem.yaml").read_text()
    for number in (1, 2, 3):
        text = text.replace(f"192.0.2.{number}", f"127.0.0.{number}")
    path = tmp_path / "onprem.yaml"
    path.write_text(text)
    return path


def invoke(*args: str):
    return CliRunner().invoke(cli, ["cluster", *args])


def test_check_of_what_is_shipped(repo_root):
    done = invoke("check", *map(str, sorted(repo_root.glob("deploy/*ray/*.yaml"))))
    assert done.exit_code == 0, done.output
    assert done.stdout.count("no mistakes") == 6
    assert "without --crd only our own checks" in done.stdout
    assert "at most       13 machines (8 of them spot), 8 GPUs" in done.stdout


def test_check_of_mistakes_names_them_and_ends_with_2(onprem):
    onprem.write_text(onprem.read_text().replace("head_ip:", "haed_ip:"))
    done = invoke("check", str(onprem))
    assert done.exit_code == 2
    assert "provider.haed_ip: provider local has no key 'haed_ip'" in done.stdout
    assert "did you mean head_ip?" in done.stdout


def test_check_tells_json(onprem):
    onprem.write_text(onprem.read_text().replace("RAY_AUTH_MODE=token ray", "ray"))
    done = invoke("check", "--json", str(onprem))
    assert done.exit_code == 2
    told = json.loads(done.stdout)
    assert told["type"] == "check"
    (finding,) = told["findings"]
    assert (finding["level"], finding["where"]) == ("unsafe", "worker_start_ray_commands[1]")
    assert finding["line"]


def test_up_of_a_file_with_places_to_fill_in(repo_root):
    done = invoke("up", "--yes", str(repo_root / "deploy/ray/aws.yaml"))
    assert done.exit_code == 2
    assert done.stderr.startswith("error[DB-CLUSTER-001]")
    assert "YOUR-GPU-AMI" in done.stderr


def test_up_of_a_file_that_lets_others_in_unless_it_is_said(onprem):
    onprem.write_text(onprem.read_text().replace("RAY_AUTH_MODE=token ray", "ray"))
    done = invoke("up", str(onprem))
    assert done.exit_code == 2
    assert "error[DB-CLUSTER-001]" in done.stderr
    assert "To do it all the same: --insecure" in done.stderr
    done = invoke("up", "--insecure", str(onprem))
    assert "error[DB-CLUSTER-004]" in done.stderr  # it got as far as asking


def test_a_file_that_is_not_there(tmp_path):
    done = invoke("check", str(tmp_path / "none.yaml"))
    assert done.exit_code == 2
    assert "error[DB-CLUSTER-002]" in done.stderr


@pytest.mark.parametrize("command", ["up", "down", "status", "dashboard", "ssh"])
def test_a_manifest_is_not_rays(repo_root, command):
    done = invoke(command, str(repo_root / "deploy/kuberay/rayjob.yaml"))
    assert done.exit_code == 2
    assert "error[DB-CLUSTER-003]" in done.stderr
    assert "kubectl apply -f" in done.stderr


@pytest.mark.parametrize("command", ["up", "down"])
def test_nobody_can_be_asked(onprem, command):
    done = invoke(command, str(onprem))
    assert done.exit_code == 2
    assert "error[DB-CLUSTER-004]" in done.stderr
    assert not (onprem.parent / "home/.ray").exists()


def test_a_head_that_does_not_answer(onprem, monkeypatch):
    monkeypatch.setattr("distbelief.cluster.remote.CONNECT_S", 2)
    done = invoke("status", str(onprem))
    assert done.exit_code == 1
    assert "error[DB-CLUSTER-005]" in done.stderr


def test_a_port_that_is_taken(onprem):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = invoke("dashboard", str(onprem), "--local-port", str(port))
    assert done.exit_code == 3
    assert "error[DB-CLUSTER-007]" in done.stderr


def test_a_token_that_others_can_read(onprem, tmp_path):
    token = tmp_path / "home/.ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    done = invoke("up", "--yes", str(onprem))
    assert done.exit_code == 3
    assert "error[DB-CLUSTER-008]" in done.stderr
    assert "chmod 600" in done.stderr


def test_a_token_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "new/auth_token"
    assert ensure(path)
    made = path.read_text()
    assert len(made) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert not ensure(path)
    assert path.read_text() == made


def test_a_folder_without_crds(repo_root, tmp_path):
    done = invoke("check", "--crd", str(tmp_path), str(repo_root / "deploy/kuberay/rayjob.yaml"))
    assert done.exit_code == 2
    assert "error[DB-CLUSTER-009]" in done.stderr


def test_without_ssh_nothing_is_started(onprem, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = invoke("up", "--yes", str(onprem))
    assert done.exit_code == 3
    assert "error[DB-CLUSTER-010]" in done.stderr


def test_a_tunnel_begins_and_ends_on_the_loopback(onprem):
    (document,), _ = parse(onprem.read_text(), str(onprem))
    words = forward(document, onprem, 8787, 9000)
    assert "127.0.0.1:9000:127.0.0.1:8787" in words
    assert words[-1] == "ubuntu@127.0.0.1"


def test_the_key_and_the_user_are_those_of_the_file(onprem):
    (document,), _ = parse(onprem.read_text(), str(onprem))
    words = ssh_command(document, "127.0.0.2", "hostname")
    key = Path(os.environ["HOME"]) / ".ssh/id_ed25519"
    assert words[words.index("-i") + 1] == str(key)
    assert words[-2:] == ["ubuntu@127.0.0.2", "hostname"]
