"""Plan: which machines a file asks for: what is shown before they are started, and paid."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distbelief.cluster import kuberay
from distbelief.cluster.cluster_file import groups_of, provider_of
from distbelief.cluster.document import Document
from distbelief.cluster.provider import machine
from distbelief.cluster.role import ROLES

GPU_LIMIT = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Machines of one kind. gpus: of each; None where only the machine itself knows."""

    name: str
    roles: str
    kind: str
    least: int
    most: int
    gpus: int | None
    is_spot: bool

    @property
    def number(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The head is one of the groups. most: of machines besides the head."""

    name: str
    where: str
    groups: Sequence[Group]
    most: int

    @property
    def at_start(self) -> str:
        return _counts((group, group.least) for group in self.groups)

    @property
    def at_most(self) -> str:
        """What it can come to; of several groups under a lower limit, any of them."""
        return _counts(((group, group.most) for group in self.groups), self.most + 1)

    @property
    def lines(self) -> list[str]:
        """As a table for a person."""
        rows = [("group", "machines", "kind", "for", "GPUs each", "")]
        rows += [
            (
                group.name,
                group.number,
                group.kind,
                group.roles,
                "?" if group.gpus is None else str(group.gpus),
                "spot" if group.is_spot else "",
            )
            for group in self.groups
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return [
            f"cluster {self.name}, {self.where}",
            *(f"  {line}" for line in table),
            f"at the start  {self.at_start}",
            f"at most       {self.at_most}",
        ]


def _counts(groups: Iterable[tuple[Group, int]], limit: int | None = None) -> str:
    told = list(groups)
    machines = sum(number for _, number in told)
    spot = sum(number for group, number in told if group.is_spot)
    gpus = sum(number * (group.gpus or 0) for group, number in told)
    is_known = all(group.gpus is not None for group, number in told if number)
    if limit is not None and limit < machines:
        machines, spot = limit, min(spot, limit)
    text = f"{machines} machine{'' if machines == 1 else 's'}"
    text += f" ({spot} of them spot)" if spot else ""
    return f"{text}, {gpus} GPUs" if is_known else f"{text}, and the GPUs that they have"


def plan_of(document: Document) -> Plan:
    """Of a cluster-launcher file without errors."""
    provider = provider_of(document)
    kind = str(provider.get("type"))
    if kind == "local":
        return _local(document, provider)
    groups, head = groups_of(document), str(document.data.get("head_node_type"))
    most = _number(document.data.get("max_workers"), 2)
    made = [_group(name, group, kind, most, is_head=name == head) for name, group in groups.items()]
    where = next((str(provider[key]) for key in ("region", "location") if provider.get(key)), "")
    return Plan(
        name=str(document.data.get("cluster_name")),
        where=f"{kind} {where}".strip(),
        groups=sorted(made, key=lambda group: group.roles != "head"),
        most=most,
    )


def _group(
    name: str,
    group: dict[str, Any],  # Any: YAML
    provider: str,
    limit: int,
    *,
    is_head: bool,
) -> Group:
    config, resources = _table(group.get("node_config")), _table(group.get("resources"))
    asked = machine(provider, config)
    # The launcher finds out what else a machine has; a file that names CPUs names GPUs too.
    gpus = _number(resources.get("GPU"), 0) if "GPU" in resources or "CPU" in resources else None
    return Group(
        name=name,
        roles="head" if is_head else _roles(resources),
        kind=asked.kind,
        least=1 if is_head else _number(group.get("min_workers"), 0),
        most=1 if is_head else _number(group.get("max_workers"), limit),
        gpus=gpus,
        is_spot=asked.is_spot,
    )


def _local(document: Document, provider: dict[str, Any]) -> Plan:  # Any: YAML
    """Machines that are there: what is in them they know themselves."""
    addresses = list(provider.get("worker_ips") or [])
    least = min(_number(document.data.get("min_workers"), len(addresses)), len(addresses))
    most = min(_number(document.data.get("max_workers"), len(addresses)), len(addresses))
    told: dict[str, Any] = {"gpus": None, "is_spot": False}  # Any: of Group
    head = Group(
        name="head", roles="head", kind=str(provider.get("head_ip")), least=1, most=1, **told
    )
    text = ", ".join(map(str, addresses[:4])) + (", ..." if len(addresses) > 4 else "")
    hosts = Group(name="hosts", roles="by command", kind=text, least=least, most=most, **told)
    return Plan(
        name=str(document.data.get("cluster_name")),
        where="machines of your own",
        groups=[head, hosts],
        most=most,
    )


def plan_of_manifest(document: Document) -> Plan | None:
    """Of a RayCluster or a RayJob; None of what lies beside it."""
    told = kuberay.cluster_of(document)
    if told is None:
        return None
    cluster = told[1]
    head = _pods(_table(cluster.get("headGroupSpec")), "head", "head", (1, 1))
    groups = [head]
    for group in kuberay.workers_of(cluster):
        least = _number(group.get("minReplicas"), 0)
        most = _number(group.get("maxReplicas"), least)
        resources = _table(group.get("resources"))
        name = str(group.get("groupName"))
        groups.append(_pods(group, name, _roles(resources), (least, most)))
    metadata = _table(document.data.get("metadata"))
    most = sum(group.most for group in groups[1:])
    return Plan(name=str(metadata.get("name")), where="Kubernetes", groups=groups, most=most)


def _pods(group: dict[str, Any], name: str, roles: str, number: tuple[int, int]) -> Group:
    # Any: YAML
    containers = kuberay.containers_of(group)
    limits = [_table(_table(one.get("resources")).get("limits")) for one in containers]
    selected = _table(kuberay.pod_of(group).get("nodeSelector"))
    return Group(
        name=name,
        roles=roles,
        kind=str(containers[0].get("image")) if containers else "?",
        least=number[0],
        most=number[1],
        gpus=sum(_number(one.get(GPU_LIMIT), 0) for one in limits),
        is_spot=any("spot" in f"{key}{value}".lower() for key, value in selected.items()),
    )


def _roles(resources: dict[str, Any]) -> str:  # Any: YAML
    return ", ".join(role for role in ROLES if role in resources) or "-"


def _table(value: object) -> dict[str, Any]:  # Any: YAML
    return value if isinstance(value, dict) else {}


def _number(value: object, otherwise: int) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
