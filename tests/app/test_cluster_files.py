"""Files of clusters: those that are shipped have no mistakes, and planted ones are found."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from distbelief.cluster import cluster_file, kuberay, ray_check
from distbelief.cluster.crd import Crds, strict
from distbelief.cluster.document import Document, parse
from distbelief.cluster.inspection import inspect
from distbelief.cluster.plan import plan_of, plan_of_manifest
from distbelief.cluster.provider import KEYS
from distbelief.cluster.remote import ray_processes, run_processes

SHIPPED = ("aws", "gcp", "azure", "onprem")
MANIFESTS = ("raycluster", "rayjob")


@pytest.fixture(scope="module")
def crds(test_data) -> Crds:
    return Crds(test_data / "kuberay")


def document_of(repo_root: Path, name: str) -> Document:
    folder = "kuberay" if name in MANIFESTS else "ray"
    path = repo_root / "deploy" / folder / f"{name}.yaml"
    documents, findings = parse(path.read_text(), str(path))
    assert findings == []
    return documents[0]


def check(document: Document, crds: Crds | None = None):
    """As inspect does; without `todo`, which the shipped files have."""
    if kuberay.is_manifest(document):
        found = kuberay.check(document) + ([] if crds is None else crds.check(document))
    else:
        found = cluster_file.check(document) + ray_check.check(document)
    return [one for one in found if one.level != "todo"]


def change(document: Document, path: str, value: object) -> Document:
    """The document with another value at a path; `None` takes the key away."""
    data = copy.deepcopy(document.data)
    *above, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    place: Any = data
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return dataclasses.replace(document, data=data)


# --- what is shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cluster_file_has_no_mistakes(repo_root, name):
    assert check(document_of(repo_root, name)) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_shipped_manifest_has_no_mistakes_by_our_rules(repo_root, name):
    inspection = inspect(repo_root / f"deploy/kuberay/{name}.yaml")
    assert inspection.kind == "kuberay"
    assert [one for one in inspection.findings if one.level != "todo"] == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_shipped_manifest_fits_its_crd(repo_root, name, crds):
    documents, _ = parse((repo_root / f"deploy/kuberay/{name}.yaml").read_text(), name)
    assert {document.data["kind"] for document in documents} & set(crds.kinds)
    assert [found for document in documents for found in crds.check(document)] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_to_be_filled_in_has_a_line(repo_root, name):
    path = repo_root / f"deploy/ray/{name}.yaml"
    lines = path.read_text().splitlines()
    for finding in inspect(path).of("todo"):
        assert finding.line is not None
        value = finding.what.split()[0]
        # What an alias brings in stands where it was said first.
        assert value in lines[finding.line - 1] or "node_config" in lines[finding.line - 1]


@pytest.mark.parametrize("name", [*SHIPPED, *MANIFESTS])
def test_a_shipped_file_opens_no_port_and_has_the_groups(repo_root, name):
    text = (document_of(repo_root, name)).data
    dumped = yaml.safe_dump(text)
    assert "LoadBalancer" not in dumped
    assert "ps" in dumped
    assert "worker" in dumped


def test_the_workers_of_clouds_are_spot_machines_with_gpus(repo_root):
    for name in ("aws", "gcp", "azure"):
        plan = plan_of(document_of(repo_root, name))
        by_name = {group.name: group for group in plan.groups}
        assert by_name["worker"].is_spot
        assert by_name["worker"].gpus == 1
        assert not by_name["ps"].is_spot
        assert plan.at_start == "3 machines, 0 GPUs"
        assert plan.at_most == "13 machines (8 of them spot), 8 GPUs"


def test_a_plan_of_machines_of_ones_own_says_what_it_does_not_know(repo_root):
    plan = plan_of(document_of(repo_root, "onprem"))
    assert plan.at_start == "3 machines, and the GPUs that they have"


def test_a_plan_of_a_manifest(repo_root):
    plan = plan_of_manifest(document_of(repo_root, "rayjob"))
    assert plan is not None
    assert plan.at_start == "3 machines, 0 GPUs"
    assert plan.at_most == "11 machines (8 of them spot), 8 GPUs"


# --- planted mistakes: file, path, value, where it is found, what is said

HEAD = "head_start_ray_commands/1"
WORKER = "worker_start_ray_commands/1"
OPEN = {"IpPermissions": [{"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp"}]}
OPEN["IpPermissions"][0]["IpRanges"] = [{"CidrIp": "0.0.0.0/0"}]
GROUPS = "available_node_types"

PLANTED = [
    ("aws", "provider/regoin", "us-west-2", "provider.regoin", "did you mean region?"),
    ("aws", "provider/cache_stoped_nodes", False, "provider.cache_stoped_nodes", "cache_stopped"),
    ("aws", "provider/location", "x", "provider.location", "passes over it silently"),
    ("aws", "provider/region", None, "provider.region", "needs it"),
    ("aws", "provider/security_group", OPEN, "IpPermissions[0]", "port 8265 is open to 0.0.0.0/0"),
    ("aws", "head_node_type", None, "head_node_type", "which of the groups"),
    ("aws", "head_node_type", "haed", "head_node_type", "did you mean head?"),
    ("aws", "max_workers", 3, "max_workers", "12 machines together, and the cluster 3"),
    ("aws", "max_workers", None, "max_workers", "Ray takes 2"),
    ("aws", f"{GROUPS}/ps/max_workers", 40, "max_workers", "48 machines together"),
    ("aws", f"{GROUPS}/ps/min_workers", 9, f"{GROUPS}.ps.max_workers", "at least 9"),
    ("aws", f"{GROUPS}/ps/resources/ps", 0.5, f"{GROUPS}.ps.resources.ps", "no whole number"),
    ("aws", f"{GROUPS}/ps/resources", {"CPU": 8, "pss": 1}, "resources.pss", "did you mean ps?"),
    ("aws", f"{GROUPS}/worker/resources/worker", None, GROUPS, "no host has the resource 'worker'"),
    ("aws", f"{GROUPS}/ps/max_wokers", 4, f"{GROUPS}.ps.max_wokers", "did you mean max_workers?"),
    ("aws", f"{GROUPS}/ps/resources", None, f"{GROUPS}.ps", "'resources' is a required property"),
    ("aws", "setup_comands", [], "setup_comands", "did you mean setup_commands?"),
    ("aws", "auth/ssh_usr", "x", "auth.ssh_usr", "did you mean ssh_user?"),
    ("aws", HEAD, "ray start --head", "head_start_ray_commands[1]", "asks nobody for a token"),
    ("aws", WORKER, "ray start --address=x", "worker_start_ray_commands[1]", "asks nobody"),
    ("aws", "head_start_ray_commands", None, "head_start_ray_commands", "every address"),
    ("aws", "file_mounts", {}, "file_mounts", "the token is not copied"),
    ("aws", "setup_commands/0", "RAY_AUTH_TOKEN=abc x", "setup_commands[0]", "every user"),
    ("aws", "setup_commands/0", "sudo ufw allow 8265", "setup_commands[0]", "opens ports"),
    (
        "aws",
        HEAD,
        "RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0",
        "head_start_ray_commands[1]",
        "listens on 0.0.0.0",
    ),
    ("aws", "docker", {"run_options": ["-p 8265:8265"]}, "docker.run_options[0]", "publishes"),
    ("gcp", "provider/availabilty_zone", "a", "provider.availabilty_zone", "availability_zone?"),
    ("gcp", "provider/project_id", None, "provider.project_id", "needs it"),
    (
        "gcp",
        f"{GROUPS}/head/node_config/tags",
        {"items": ["https-server"]},
        f"{GROUPS}.head.node_config.tags.items",
        "open to the world",
    ),
    ("gcp", "cluster_nme", "x", "cluster_nme", "did you mean cluster_name?"),
    ("azure", "provider/resource_grp", "x", "provider.resource_grp", "resource_group?"),
    ("azure", "provider/resource_group", None, "provider.resource_group", "needs it"),
    (
        "azure",
        f"{GROUPS}/ps/node_config/azure_arm_parameters/vmsize",
        "x",
        f"{GROUPS}.ps.node_config.azure_arm_parameters.vmsize",
        "did you mean vmSize?",
    ),
    ("onprem", "provider/worker_ip", [], "provider.worker_ip", "did you mean worker_ips?"),
    ("onprem", "provider/worker_ips", None, "(top)", "worker_ips"),
    ("onprem", "provider/worker_ips/1", "192.0.2.1", "provider.worker_ips[1]", "is the head"),
    ("onprem", "provider/worker_ips/1", "192.0.2.2", "provider.worker_ips[1]", "already"),
    ("onprem", "min_workers", 5, "min_workers", "5 hosts at least, and 2 addresses"),
    ("onprem", "max_workers", 1, "max_workers", "some are never used"),
    (
        "onprem",
        HEAD,
        "RAY_AUTH_MODE=token ray start --head --autoscaling-config=x",
        "head_start_ray_commands[1]",
        "newer autoscaler",
    ),
    (
        "onprem",
        HEAD,
        "RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=0 ray start --head",
        "head_start_ray_commands[1]",
        "no worker host is ever started",
    ),
    (
        "onprem",
        WORKER,
        'RAY_AUTH_MODE=token ray start --address=x --resources=\'{"ps": 1, "wroker": 1}\'',
        "worker_start_ray_commands[1]",
        "did you mean worker?",
    ),
    ("onprem", "available_node_types", {"a": {}}, "(top)", "not supported for on-premise"),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "where", "what"),
    PLANTED,
    ids=[f"{row[0]}-{row[3]}-{row[4]}" for row in PLANTED],
)
def test_a_planted_mistake_is_found_with_its_place(repo_root, name, path, value, where, what):
    found = check(change(document_of(repo_root, name), path, value))
    told = [(one.where, f"{one.what} {one.fix}") for one in found]
    assert any(place.endswith(where) and what in text for place, text in told), told


GROUP = "spec/workerGroupSpecs/0"
CONTAINER = f"{GROUP}/template/spec/containers/0"
OURS = [
    ("spec/workerGroupSpec", [], "spec.workerGroupSpec", "did you mean workerGroupSpecs?"),
    (f"{GROUP}/groupNam", "x", "workerGroupSpecs[0].groupNam", "did you mean groupName?"),
    (f"{GROUP}/groupName", None, "workerGroupSpecs[0].groupName", "no name"),
    (f"{GROUP}/groupName", "worker", "workerGroupSpecs[1].groupName", "worker already"),
    (f"{GROUP}/minReplicas", 9, "workerGroupSpecs[0].maxReplicas", "at least 9"),
    (f"{GROUP}/replicas", 1, "workerGroupSpecs[0].replicas", "not between"),
    (f"{GROUP}/minReplicas", 0.5, "workerGroupSpecs[0].minReplicas", "no whole number"),
    (f"{GROUP}/resources/ps", 1, "resources.ps", "no string"),
    (f"{GROUP}/resources", {"CPU": "4", "pss": "1"}, "resources.pss", "did you mean ps?"),
    ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "num-cpus", "no string"),
    ("spec/headGroupSpec/rayStartParams", {}, "rayStartParams", "on the head"),
    ("spec/headGroupSpec/serviceType", "LoadBalancer", "serviceType", "outside"),
    ("spec/headGroupSpec/enableIngress", True, "enableIngress", "outside"),
    ("spec/authOptions", None, "spec.authOptions.mode", "there is no token"),
    ("spec/authOptions/mode", "disabled", "spec.authOptions.mode", "there is no token"),
    (f"{GROUP}/template/spec/hostNetwork", True, "hostNetwork", "node's own addresses"),
    (f"{CONTAINER}/ports", [{"hostPort": 1}], "ports[0].hostPort", "node's own addresses"),
    (f"{CONTAINER}/securityContext/privileged", True, "securityContext.privileged", "root"),
    (f"{CONTAINER}/env", [{"name": "RAY_AUTH_TOKEN", "value": "x"}], "env[0].value", "manifest"),
    (f"{CONTAINER}/image", "rayproject/ray:2.59.0", "image", "rayVersion is 2.60.0"),
    ("spec/enableInTreeAutoscaling", False, "maxReplicas", "never 4 of it"),
    ("apiVersion", "ray.io/v1alpha1", "apiVersion", "ray.io/v1"),
    ("kind", "RayClutser", "kind", "did you mean RayCluster?"),
]
BY_CRD = [
    (f"{GROUP}/template/spec/containers/0/imag", "x", "containers[0].imag", "did you mean image?"),
    (f"{GROUP}/template/spec/containers/0/ports", [{"containerPort": "a"}], "containerPort", "'a'"),
    (f"{GROUP}/replica", 2, "workerGroupSpecs[0].replica", "did you mean replicas?"),
    ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "num-cpus", "not of type 'string'"),
    ("spec/authOptions/mode", "tokn", "spec.authOptions.mode", "'tokn'"),
    ("spec/autoscalerOptions/version", "v3", "spec.autoscalerOptions.version", "'v3'"),
    (f"{CONTAINER}/livenessProbe/periodSecond", 3, "periodSecond", "did you mean periodSeconds?"),
    ("spec/headGroupSpec/template", None, "spec.headGroupSpec", "'template' is a required"),
]


@pytest.mark.parametrize(("path", "value", "where", "what"), OURS)
def test_a_mistake_planted_in_a_manifest_is_found_without_crd(repo_root, path, value, where, what):
    found = check(change(document_of(repo_root, "raycluster"), path, value))
    told = [(one.where, f"{one.what} {one.fix}") for one in found]
    assert any(place.endswith(where) and what in text for place, text in told), told


@pytest.mark.parametrize(("path", "value", "where", "what"), BY_CRD)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistake_planted_in_a_manifest_is_found_by_its_crd(
    repo_root, crds, name, path, value, where, what
):
    if name == "rayjob":
        path = path.replace("spec", "spec/rayClusterSpec", 1)
        where = where.replace("spec.", "spec.rayClusterSpec.", 1) if "spec." in where else where
    found = crds.check(change(document_of(repo_root, name), path, value))
    told = [(one.where, f"{one.what} {one.fix}") for one in found]
    assert any(place.endswith(where) and what in text for place, text in told), told


def test_a_job_without_a_command_is_found(repo_root):
    found = check(change(document_of(repo_root, "rayjob"), "spec/entrypoint", None))
    assert [one.where for one in found] == ["spec.entrypoint"]


def test_a_job_whose_cluster_stays_is_warned_of(repo_root):
    path = "spec/shutdownAfterJobFinishes"
    (found,) = check(change(document_of(repo_root, "rayjob"), path, False))
    assert (found.level, found.where) == ("warning", "spec.shutdownAfterJobFinishes")


def test_a_secret_in_a_file_is_found():
    text = "apiVersion: v1\nkind: Secret\nstringData:\n  auth_token: abc\n"
    (document,), _ = parse(text, "secret.yaml")
    (found,) = check(document)
    assert (found.level, found.where, found.line) == ("unsafe", "stringData.auth_token", 4)


# --- YAML

LETTERS = "abcdefghijklmnopqrstuvw"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not YAML"),
        ("a:\n\t- 1\n", 2, "not YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, "there already, in line 1"),
        ("- 1\n- 2\n", 1, "a list, not a mapping"),
        ("a: !!python/object:os.system {}\n", 1, "not YAML"),
        ("", None, "nothing in it"),
        ("a: \x01\n", None, "not YAML"),
        ("a: &x [*x]\n", None, "without end"),
        (
            "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(LETTERS)),
            None,
            "without end",
        ),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text, line, what):
    _, findings = parse(text, "x.yaml")
    assert any(found.line == line and what in found.what for found in findings), findings


def test_a_finding_says_file_line_and_path(repo_root, tmp_path):
    text = (repo_root / "deploy/ray/aws.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("  region: us-west-2", "  regoin: us-west-2"))
    line = 1 + next(i for i, one in enumerate(path.read_text().splitlines()) if "regoin" in one)
    texts = [found.text for found in inspect(path).of("error")]
    assert any(text.startswith(f"{path}:{line}: error: provider.regoin: ") for text in texts)


def test_all_that_is_wrong_at_one_place_is_said(repo_root, tmp_path):
    text = (repo_root / "deploy/ray/onprem.yaml").read_text()
    path = tmp_path / "mine.yaml"
    text = text.replace("RAY_AUTH_MODE=token RAY_enable_autoscaler_v2=0", "")
    path.write_text(text.replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"))
    found = [one for one in inspect(path).findings if one.level != "todo"]
    assert {one.where for one in found} == {"head_start_ray_commands[1]"}
    assert len(found) == 3


# --- the parts


def test_what_ray_itself_knows_of_a_provider_we_know_too():
    import json

    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    ours = set().union(*KEYS.values())
    told = set(schema["properties"]["provider"]["properties"])
    # Of other providers, or written by Ray itself.
    others = {"module", "namespace", "autoscaler_service_account", "autoscaler_role"}
    others |= {"autoscaler_role_binding", "msi_identity_id", "msi_identity_principal_id"}
    assert told - ours - others == {"subnet_id"}  # which no code of Ray reads


def test_a_private_range_and_ssh_may_be_opened(repo_root):
    rules = [
        {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]},
        {"FromPort": -1, "ToPort": -1, "IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]},
    ]
    document = document_of(repo_root, "aws")
    assert check(change(document, "provider/security_group", {"IpPermissions": rules})) == []


def test_defaulted_keys_of_a_crd_are_not_required():
    schema = {
        "type": "object",
        "required": ["a", "b"],
        "properties": {
            "a": {"type": "integer", "default": 1},
            "b": {"x-kubernetes-int-or-string": True, "type": "string"},
            "c": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
        },
    }
    made = strict(schema)
    assert made["required"] == ["b"]
    assert made["properties"]["b"] == {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    assert made["additionalProperties"] is False
    assert "additionalProperties" not in made["properties"]["c"]


def test_processes_of_ray_are_told_from_others():
    listed = """
      12 /opt/v/lib/python3.11/site-packages/ray/core/src/ray/raylet/raylet --raylet_socket_name=x
      13 ray::IDLE
      14 /opt/v/bin/python -u /opt/v/lib/python3.11/site-packages/ray/dashboard/agent.py
      15 python -m ray.util.client.server --port=10001
      16 bash --login -c ray stop --force
      17 vim /home/u/ray/notes.txt
      18 ray-dashboard-JobHead-0
      19 /opt/v/bin/python -m distbelief.controller.process
      20 /opt/v/bin/python /opt/v/bin/distbelief launch --address auto
      21 /opt/v/bin/python -m distbelief cluster down mine.yaml
      22 vim /home/u/distbelief/README.md
    """
    assert [line.split()[0] for line in ray_processes(listed)] == ["12", "13", "14", "15", "18"]
    assert [line.split()[0] for line in run_processes(listed)] == ["19", "20"]
