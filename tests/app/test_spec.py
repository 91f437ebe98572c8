"""Spec: all that a process is told, as it goes through its standard input."""

from dataclasses import replace
from pathlib import Path

import pytest

from distbelief.keyring import Keyring
from distbelief.param_server.secret import Secret
from distbelief.spec import Spec

SPEC = Spec(
    role="worker",
    index=3,
    inc=2,
    run="20261123-0012",
    token="secret",
    controller="tcp://127.0.0.1:5000",
    job='{"workers": 4}',
    run_path="/runs/20261123-0012",
    cwd="/home/me",
    contract="é",
)


def test_a_spec_survives_its_json():
    assert Spec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(("role", "name"), [("worker", "w3"), ("shard", "shard3")])
def test_processes_are_named_by_role_and_index(role, name):
    spec = replace(SPEC, role=role)
    assert spec.name == name
    assert spec.out == Path(f"/runs/20261123-0012/logs/{name}.out")


def test_the_token_is_not_shown():
    assert "secret" not in repr(SPEC)


@pytest.mark.parametrize("name", ["w1", "shard0"])
def test_keys_and_token_get_through_its_json_and_are_not_shown(name):
    keys = Keyring(["w0", "w1"], ["shard0"]).of(name)
    spec = replace(SPEC, token=Secret("o7rs4eT"), keys=keys)
    heard = Spec.from_json(spec.to_json())
    assert heard == spec
    secrets = [keys.mine.secret, keys.serving or "-" * 40, Secret(heard.token)]
    for shown in (repr(heard), str(heard), f"{heard}", repr(heard.token), str(heard.keys)):
        assert not any(str.__str__(secret) in shown for secret in secrets)


def test_a_spec_of_another_version_is_refused():
    with pytest.raises(TypeError, match="colour"):
        Spec.from_json(SPEC.to_json()[:-1] + ', "colour": 1}')
