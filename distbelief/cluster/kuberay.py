"""KubeRay: what is wrong with a manifest of a RayCluster or a RayJob, without its CRD.

Pure: from a document to findings. The whole of the schema is crd.py's.
"""

import re
from collections.abc import Iterator
from typing import Any

from distbelief.cluster.document import PLACEHOLDER, Document, placeholders
from distbelief.cluster.finding import Finding, Path_, nearest
from distbelief.cluster.role import PS, ROLES, STANDARD, WORKER

Yaml = dict[str, Any]  # Any: YAML
API = "ray.io/v1"
KINDS = ("RayCluster", "RayJob", "RayService")
BESIDE = (
    "ConfigMap",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodDisruptionBudget",
    "Secret",
    "Service",
    "ServiceAccount",
)
"""What may lie in the same file, and is Kubernetes' own."""

CLUSTER_KEYS = frozenset(
    {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "headGroupSpec",
        "headServiceAnnotations",
        "historyServerOptions",
        "managedBy",
        "networkPolicy",
        "rayVersion",
        "suspend",
        "tlsOptions",
        "upgradeStrategy",
        "workerGroupSpecs",
    }
)
HEAD_KEYS = frozenset(
    {
        "enableIngress",
        "headService",
        "ingressOptions",
        "labels",
        "rayStartParams",
        "resources",
        "serviceType",
        "template",
    }
)
GROUP_KEYS = frozenset(
    {
        "groupName",
        "idleTimeoutSeconds",
        "labels",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "priority",
        "rayStartParams",
        "replicas",
        "resources",
        "scaleStrategy",
        "suspend",
        "template",
    }
)
JOB_KEYS = frozenset(
    {
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
        "entrypointNumGpus",
        "entrypointResources",
        "jobId",
        "managedBy",
        "metadata",
        "preRunningDeadlineSeconds",
        "rayClusterSpec",
        "runtimeEnvYAML",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "submitterConfig",
        "submitterPodTemplate",
        "suspend",
        "ttlSecondsAfterFinished",
    }
)
OPEN_SERVICES = ("LoadBalancer", "NodePort")
_RAY_TAG = re.compile(r"(?:^|/)ray:(\d+\.\d+\.\d+)")


def is_manifest(document: Document) -> bool:
    return "apiVersion" in document.data or "kind" in document.data


def check(document: Document) -> list[Finding]:
    """What is wrong with a manifest."""
    return list(_check(document))


def cluster_of(document: Document) -> tuple[Path_, Yaml] | None:
    """Where the description of the Ray cluster begins, and what it is."""
    spec = document.data.get("spec")
    if not isinstance(spec, dict):
        return None
    path: Path_ = ("spec",)
    if document.data.get("kind") == "RayJob":
        path, spec = (*path, "rayClusterSpec"), spec.get("rayClusterSpec")
    elif document.data.get("kind") != "RayCluster":
        return None
    return (path, spec) if isinstance(spec, dict) else None


def workers_of(cluster: Yaml) -> list[Yaml]:
    told = cluster.get("workerGroupSpecs")
    return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def pod_of(group: Yaml) -> Yaml:
    template = group.get("template")
    spec = template.get("spec") if isinstance(template, dict) else None
    return spec if isinstance(spec, dict) else {}


def containers_of(group: Yaml) -> list[Yaml]:
    told = pod_of(group).get("containers")
    return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def _check(document: Document) -> Iterator[Finding]:
    kind = document.data.get("kind")
    if kind in BESIDE:
        yield from placeholders(document)
        yield from _secret(document)
        return
    if kind not in KINDS:
        what = f"this is no manifest that is known here: kind {kind!r}"
        yield document.say("error", ("kind",), what, nearest(kind, (*KINDS, *BESIDE)))
        return
    if document.data.get("apiVersion") != API:
        what = f"{kind} is of {API}, not of {document.data.get('apiVersion')!r}"
        yield document.say("error", ("apiVersion",), what, API)
    yield from _unknown(document, ("spec",), document.data.get("spec"), _keys_of_spec(str(kind)))
    told = cluster_of(document)
    if told is None:
        if kind != "RayService":
            yield document.say("error", ("spec",), "there is no description of a cluster in it")
    else:
        yield from _cluster(document, *told)
    yield from _job(document)
    yield from placeholders(document)


def _keys_of_spec(kind: str) -> frozenset[str]:
    return {"RayCluster": CLUSTER_KEYS, "RayJob": JOB_KEYS}.get(kind, frozenset())


def _unknown(
    document: Document, path: Path_, told: object, known: frozenset[str]
) -> Iterator[Finding]:
    for key in told if isinstance(told, dict) and known else ():
        if str(key) not in known:
            near = nearest(key, known)
            yield document.say("error", (*path, str(key)), f"there is no key {key!r} here", near)


def _cluster(document: Document, path: Path_, cluster: Yaml) -> Iterator[Finding]:
    if document.data.get("kind") == "RayJob":
        yield from _unknown(document, path, cluster, CLUSTER_KEYS)
    head = cluster.get("headGroupSpec")
    if not isinstance(head, dict):
        yield document.say("error", (*path, "headGroupSpec"), "there is no head")
        head = {}
    yield from _head(document, (*path, "headGroupSpec"), head)
    yield from _groups(document, (*path, "workerGroupSpecs"), cluster)
    yield from _token(document, path, cluster)
    yield from _versions(document, path, cluster)


def _head(document: Document, path: Path_, head: Yaml) -> Iterator[Finding]:
    yield from _unknown(document, path, head, HEAD_KEYS)
    yield from _group(document, path, head)
    if head.get("serviceType") in OPEN_SERVICES:
        what = f"a {head['serviceType']} shows the dashboard, which can start jobs, outside"
        yield document.say("unsafe", (*path, "serviceType"), what, f"ClusterIP; {FORWARD}")
    if head.get("enableIngress") is True:
        what = "an ingress shows the dashboard, which can start jobs, outside"
        yield document.say("unsafe", (*path, "enableIngress"), what, f"false; {FORWARD}")
    params = head.get("rayStartParams")
    if not isinstance(params, dict) or str(params.get("num-cpus")) != "0":
        where: Path_ = (*path, "rayStartParams")
        what = "processes of runs may come to lie on the head, whose loss ends the cluster"
        yield document.say("warning", where, what, 'num-cpus: "0"')


FORWARD = "kubectl port-forward reaches it"


def _groups(document: Document, path: Path_, cluster: Yaml) -> Iterator[Finding]:
    names: list[object] = []
    roles: set[str] = set()
    scales = cluster.get("enableInTreeAutoscaling") is True
    for position, group in enumerate(workers_of(cluster)):
        here = (*path, position)
        name = group.get("groupName")
        if name is None:
            yield document.say("error", (*here, "groupName"), "the group has no name")
        elif name in names:
            what = f"there is a group {name} already"
            yield document.say("error", (*here, "groupName"), what)
        names.append(name)
        yield from _unknown(document, here, group, GROUP_KEYS)
        yield from _group(document, here, group)
        yield from _counts(document, here, group, scales=scales)
        told = group.get("resources")
        roles |= set(map(str, told)) if isinstance(told, dict) else set()
    for role, what in ((PS, "shards"), (WORKER, "workers")):
        if role not in roles:
            text = f"no group has the resource {role!r}, so {what} have no place of their own"
            yield document.say("error", path, text, f'resources: {{{role}: "1"}} in a group')


def _counts(document: Document, path: Path_, group: Yaml, *, scales: bool) -> Iterator[Finding]:
    least, now = group.get("minReplicas", 0), group.get("replicas")
    most = group.get("maxReplicas")
    for key, value in (("minReplicas", least), ("maxReplicas", most), ("replicas", now)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            what = f"{value!r} is no whole number"
            yield document.say("error", (*path, key), what)
            return
    if most is not None and least > most:
        what = f"at least {least} and at most {most}"
        yield document.say("error", (*path, "maxReplicas"), what, f"{least} or more")
    elif now is not None and (now < least or (most is not None and now > most)):
        what = f"{now} is not between minReplicas, {least}, and maxReplicas, {most}"
        yield document.say("error", (*path, "replicas"), what)
    if not scales and most is not None and most != (least if now is None else now):
        what = f"without enableInTreeAutoscaling there are never {most} of it"
        yield document.say("warning", (*path, "maxReplicas"), what)


def _group(document: Document, path: Path_, group: Yaml) -> Iterator[Finding]:
    """Of the head and of each group of workers."""
    for table in ("rayStartParams", "resources", "labels"):
        told = group.get(table)
        for key, value in (told if isinstance(told, dict) else {}).items():
            here = (*path, table, str(key))
            if not isinstance(value, str):
                what = f"{value!r} is no string, and Kubernetes refuses it"
                yield document.say("error", here, what, f'"{value}"')
            if table == "resources" and str(key) not in (*ROLES, *STANDARD):
                near = nearest(key, (*ROLES, *STANDARD))
                if near.startswith("did you"):
                    yield document.say("error", here, f"no process asks for {key!r}", near)
    pod: Path_ = (*path, "template", "spec")
    if pod_of(group).get("hostNetwork") is True:
        what = "Ray's ports are open on the node's own addresses"
        yield document.say("unsafe", (*pod, "hostNetwork"), what, "leave it out")
    if not containers_of(group):
        yield document.say("error", (*pod, "containers"), "there is no container")
    for position, container in enumerate(containers_of(group)):
        yield from _container(document, (*pod, "containers", position), container)


def _container(document: Document, path: Path_, container: Yaml) -> Iterator[Finding]:
    context = container.get("securityContext")
    if isinstance(context, dict) and context.get("privileged") is True:
        here: Path_ = (*path, "securityContext", "privileged")
        yield document.say("unsafe", here, "a privileged container is root on its node", "false")
    ports = container.get("ports")
    for position, port in enumerate(ports if isinstance(ports, list) else []):
        if isinstance(port, dict) and "hostPort" in port:
            here = (*path, "ports", position, "hostPort")
            what = "the port is open on the node's own addresses"
            yield document.say("unsafe", here, what, f"leave it out; {FORWARD}")
    env = container.get("env")
    for position, one in enumerate(env if isinstance(env, list) else []):
        if isinstance(one, dict) and one.get("name") == "RAY_AUTH_TOKEN" and "value" in one:
            here = (*path, "env", position, "value")
            what = "the token stands in the manifest"
            yield document.say("unsafe", here, what, "authOptions.secretName, or secretKeyRef")


def _token(document: Document, path: Path_, cluster: Yaml) -> Iterator[Finding]:
    told = cluster.get("authOptions")
    mode = told.get("mode") if isinstance(told, dict) else None
    if mode != "token":
        what = "whoever reaches the cluster runs what they like on it: there is no token"
        here = (*path, "authOptions", "mode")
        yield document.say("unsafe", here, what, "authOptions: {mode: token}")


def _versions(document: Document, path: Path_, cluster: Yaml) -> Iterator[Finding]:
    """Ray's own images, whose version is in their tag."""
    version = cluster.get("rayVersion")
    groups = [((*path, "headGroupSpec"), cluster.get("headGroupSpec"))]
    groups += [
        ((*path, "workerGroupSpecs", position), group)
        for position, group in enumerate(workers_of(cluster))
    ]
    for where, group in groups:
        for position, container in enumerate(containers_of(group) if group else []):
            match = _RAY_TAG.search(str(container.get("image")))
            if match and version is not None and match[1] != str(version):
                here: Path_ = (*where, "template", "spec", "containers", position, "image")
                what = f"the image has Ray {match[1]}, and rayVersion is {version}"
                yield document.say("error", here, what, "the same everywhere")


def _job(document: Document) -> Iterator[Finding]:
    spec = document.data.get("spec")
    if document.data.get("kind") != "RayJob" or not isinstance(spec, dict):
        return
    if not spec.get("entrypoint"):
        yield document.say("error", ("spec", "entrypoint"), "the job runs nothing")
    if spec.get("shutdownAfterJobFinishes") is not True:
        what = "the cluster stays, and costs, when the job is over"
        here: Path_ = ("spec", "shutdownAfterJobFinishes")
        yield document.say("warning", here, what, "true")


def _secret(document: Document) -> Iterator[Finding]:
    """A token in a manifest ends up in version control."""
    if document.data.get("kind") != "Secret":
        return
    for table in ("data", "stringData"):
        told = document.data.get(table)
        for key, value in (told if isinstance(told, dict) else {}).items():
            if not PLACEHOLDER.search(str(value)):
                what = "a secret stands in the file"
                fix = "kubectl create secret generic NAME --from-file=auth_token=FILE"
                yield document.say("unsafe", (table, str(key)), what, fix)
