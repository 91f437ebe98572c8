"""ClusterFile: what Ray's cluster launcher accepts silently, and should not be written.

Pure: from a document to findings. What Ray itself refuses is ray_check.py's.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any

from distbelief.cluster.document import Document, placeholders
from distbelief.cluster.finding import Finding, Path_, nearest
from distbelief.cluster.provider import KEYS, NODE_KEYS, REQUIRED
from distbelief.cluster.role import PS, ROLES, STANDARD, WORKER

Groups = dict[str, dict[str, Any]]  # Any: YAML
TOKEN_MODE = "RAY_AUTH_MODE=token"
TOKEN_FILE = ".ray/auth_token"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
NEEDS_V1 = "RAY_enable_autoscaler_v2=0"

_STARTS = re.compile(r"\bray start\b")
_DASHBOARD = re.compile(r"--dashboard-host[= ]['\"]?([^\s'\"]+)")
_RESOURCES = re.compile(r"[\"'\\]+([A-Za-z_][\w.-]*)[\"'\\]+ *:")
_GIVES_AWAY = re.compile(r"\bRAY_AUTH_TOKEN=")
_OPENS = re.compile(
    r"\bufw +(?:allow|disable)\b|\biptables\b[^;|&]*-j +ACCEPT\b|\bfirewall-cmd\b[^;|&]*--add-"
    r"|\bauthorize-security-group-ingress\b|\bfirewall-rules +create\b|\bnsg +rule +create\b"
)
_PUBLISHES = re.compile(r"^(?:-p|--publish)(?:[= ]|(?=\d))(?P<what>.*)$")
OPEN_TAGS = ("http-server", "https-server")
"""GCP's default network lets the world in at ports 80 and 443 of machines with these tags."""

EXAMPLES = tuple(
    ipaddress.ip_network(net) for net in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
)
"""Addresses that stand for others in documentation (RFC 5737)."""


def check(document: Document) -> list[Finding]:
    """What is wrong with a cluster-launcher file."""
    return [finding for rule in RULES for finding in rule(document)]


def commands_of(data: dict[str, Any], key: str) -> list[str]:  # Any: YAML
    told = data.get(key)
    return [str(one) for one in told] if isinstance(told, list) else []


def provider_of(document: Document) -> dict[str, Any]:  # Any: YAML
    told = document.data.get("provider")
    return told if isinstance(told, dict) else {}


def groups_of(document: Document) -> Groups:
    """The groups of a cluster, without what is none; those of a local one are in its commands."""
    told = document.data.get("available_node_types")
    groups = told if isinstance(told, dict) else {}
    return {str(name): group for name, group in groups.items() if isinstance(group, dict)}


# --- the provider


def _provider(document: Document) -> Iterator[Finding]:
    provider = provider_of(document)
    kind = provider.get("type")
    if not isinstance(kind, str):
        fix = f"one of {', '.join(sorted(KEYS))}"
        yield document.say("error", ("provider", "type"), "the provider's type is missing", fix)
        return
    if kind not in KEYS:
        what = f"the keys of provider {kind!r} are not known here, and not looked at"
        yield document.say("warning", ("provider", "type"), what, nearest(kind, KEYS))
        return
    for key in provider:
        if str(key) not in KEYS[kind]:
            what = f"provider {kind} has no key {key!r}, and Ray passes over it silently"
            near = nearest(key, KEYS[kind])
            yield document.say("error", ("provider", str(key)), what, near)
    for key in REQUIRED[kind]:
        if not provider.get(key):
            yield document.say("error", ("provider", key), f"provider {kind} needs it")


def _nodes(document: Document) -> Iterator[Finding]:
    """Keys of node_config, where they are Ray's own."""
    table, known = NODE_KEYS.get(str(provider_of(document).get("type")), ("", frozenset()))
    for name, group in groups_of(document).items():
        config = group.get("node_config")
        told = config.get(table) if isinstance(config, dict) else None
        for key in told if isinstance(told, dict) else ():
            if str(key) not in known:
                path: Path_ = ("available_node_types", name, "node_config", table, str(key))
                what = f"{table} has no key {key!r}"
                yield document.say("error", path, what, nearest(key, known))


def _hosts(document: Document) -> Iterator[Finding]:
    """Of provider local: addresses that are there twice, and what its autoscaler needs."""
    provider = provider_of(document)
    if provider.get("type") != "local" or "coordinator_address" in provider:
        return
    path: Path_ = ("provider", "worker_ips")
    workers = provider.get("worker_ips")
    workers = workers if isinstance(workers, list) else []
    for position, address in enumerate(workers):
        if address == provider.get("head_ip"):
            what = f"{address} is the head, which Ray would start twice"
            yield document.say("error", (*path, position), what, "take it out here")
        elif address in workers[:position]:
            what = f"{address} is in the list already"
            yield document.say("error", (*path, position), what, "take it out once")
    wanted = document.data.get("min_workers", len(workers))
    if isinstance(wanted, int) and wanted > len(workers):
        what = f"{wanted} hosts at least, and {len(workers)} addresses"
        yield document.say("error", ("min_workers",), what, f"{len(workers)}, or more hosts")
    most = document.data.get("max_workers", len(workers))
    if isinstance(most, int) and most < len(workers):
        what = f"at most {most} hosts, and {len(workers)} addresses: some are never used"
        yield document.say("warning", ("max_workers",), what, str(len(workers)))
    for position, command in _starts(document, "head_start_ray_commands"):
        here: Path_ = ("head_start_ray_commands", position)
        if NEEDS_V1 not in command:
            what = "with Ray's newer autoscaler only some of the worker hosts are ever started"
            fix = f"{NEEDS_V1} before `ray start`: it counts the head as one of the workers"
            yield document.say("error", here, what, fix)
        if "--autoscaling-config" not in command:
            what = "without --autoscaling-config no worker host is ever started"
            fix = "--autoscaling-config=~/ray_bootstrap_config.yaml"
            yield document.say("error", here, what, fix)


# --- how many


def _counts(document: Document) -> Iterator[Finding]:
    groups, head = groups_of(document), document.data.get("head_node_type")
    if not groups:
        return
    top = document.data.get("max_workers")
    if top is None:
        what = "max_workers is missing: Ray takes 2, whatever the groups say"
        yield document.say("error", ("max_workers",), what, "the sum of the groups")
    total = 0
    for name, group in groups.items():
        least, most = group.get("min_workers", 0), group.get("max_workers")
        path: Path_ = ("available_node_types", name, "max_workers")
        if name == head:
            continue
        if most is None:
            what = f"group {name} has no max_workers of its own: all machines may be its"
            yield document.say("warning", path, what, "say how many it may have")
        elif isinstance(least, int) and isinstance(most, int) and least > most:
            what = f"group {name} has at least {least} machines and at most {most}"
            yield document.say("error", path, what, f"{least} or more")
        total += most if isinstance(most, int) else 0
    if isinstance(top, int) and total > top:
        what = f"the groups may have {total} machines together, and the cluster {top}"
        fix = f"max_workers: {total}, or fewer in a group"
        yield document.say("error", ("max_workers",), what, fix)


def _head(document: Document) -> Iterator[Finding]:
    groups, head = groups_of(document), document.data.get("head_node_type")
    if not groups:
        return
    path: Path_ = ("head_node_type",)
    if head is None:
        what = "which of the groups is the head's is not said"
        yield document.say("error", path, what, f"one of {', '.join(sorted(groups))}")
    elif head not in groups:
        what = f"there is no group {head!r}"
        yield document.say("error", path, what, nearest(head, groups))


# --- resources


def _resources(document: Document) -> Iterator[Finding]:
    """Are there hosts of each role: our processes wait for ever for what no group has."""
    named: dict[str, Path_] = {}
    for name, group in groups_of(document).items():
        told = group.get("resources")
        for key, value in (told if isinstance(told, dict) else {}).items():
            path: Path_ = ("available_node_types", name, "resources", str(key))
            named[str(key)] = path
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                what = f"{value!r} is no whole number, and Ray takes no other here"
                fix = "a whole number; a process may ask for a share of it"
                yield document.say("error", path, what, fix)
    for key in START_COMMANDS:
        for position, command in _starts(document, key):
            if "--resources" in command:  # which may take a variable that is set before
                named |= {word: (key, position) for word in _RESOURCES.findall(command)}
    for word, path in named.items():
        if word not in (*ROLES, *STANDARD) and (near := _misspelt(word)):
            what = f"no process asks for {word!r}"
            yield document.say("error", path, what, f"did you mean {near}?")
    for role, what in ((PS, "shards"), (WORKER, "workers")):
        if role not in named:
            path = ("available_node_types",) if groups_of(document) else START_COMMANDS[1:]
            text = f"no host has the resource {role!r}, so {what} have no place of their own"
            fix = f"resources: {{{role}: 1}} in a group; of provider local --resources"
            yield document.say("error", path, text, fix)


def _misspelt(word: str) -> str:
    near = nearest(word, (*ROLES, *STANDARD))
    return near.removeprefix("did you mean ").removesuffix("?") if "did you" in near else ""


# --- who gets in


def _ports(document: Document) -> Iterator[Finding]:
    """Whatever lets others than SSH in from outside."""
    group = provider_of(document).get("security_group")
    rules = group.get("IpPermissions") if isinstance(group, dict) else None
    for position, rule in enumerate(rules if isinstance(rules, list) else []):
        if isinstance(rule, dict) and (what := _open_rule(rule)):
            path: Path_ = ("provider", "security_group", "IpPermissions", position)
            yield document.say("unsafe", path, what, TUNNEL)
    for name, node in groups_of(document).items():
        config = node.get("node_config")
        tags = config.get("tags") if isinstance(config, dict) else None
        items = tags.get("items") if isinstance(tags, dict) else None
        for tag in items if isinstance(items, list) else []:
            if tag in OPEN_TAGS:
                path = ("available_node_types", name, "node_config", "tags", "items")
                what = f"machines with the tag {tag} are open to the world"
                yield document.say("unsafe", path, what, TUNNEL)
    yield from _docker(document)
    yield from _firewalls(document)


TUNNEL = "leave it out: `distbelief cluster dashboard` comes by SSH"


def _open_rule(rule: dict[str, Any]) -> str:  # Any: YAML
    """Why a rule of a security group is too much; empty if it is not."""
    ranges = [
        *(("IpRanges", "CidrIp", one) for one in rule.get("IpRanges") or []),
        *(("Ipv6Ranges", "CidrIpv6", one) for one in rule.get("Ipv6Ranges") or []),
    ]
    nets = [str(one.get(key)) for _, key, one in ranges if isinstance(one, dict)]
    public = [net for net in nets if not _is_private(net)]
    first, last = rule.get("FromPort", -1), rule.get("ToPort", -1)
    is_ssh = str(rule.get("IpProtocol")) in ("tcp", "6") and first == last == 22
    if not public or is_ssh:
        return ""
    if first in (-1, 0):
        ports = "all ports are"
    else:
        ports = f"port {first} is" if first == last else f"ports {first} to {last} are"
    return f"{ports} open to {', '.join(public)}"


def _is_private(net: str) -> bool:
    try:
        told = ipaddress.ip_network(net, strict=False)
    except ValueError:
        return False
    # Some versions of Python call all addresses private, as the first and the last are.
    return told.prefixlen > 0 and told.is_private


def _docker(document: Document) -> Iterator[Finding]:
    docker = document.data.get("docker")
    for key, told in (docker if isinstance(docker, dict) else {}).items():
        if not str(key).endswith("run_options") or not isinstance(told, list):
            continue
        for position, option in enumerate(told):
            match = _PUBLISHES.match(str(option))
            if match and not match["what"].startswith(LOOPBACK):
                what = f"{option} publishes a port on every address of the host"
                path: Path_ = ("docker", str(key), position)
                yield document.say("unsafe", path, what, "-p 127.0.0.1:PORT:PORT, or leave it")
            if str(option) == "--privileged":
                what = "a privileged container is root on its host"
                yield document.say("unsafe", ("docker", str(key), position), what, "leave it")


def _firewalls(document: Document) -> Iterator[Finding]:
    for key in (
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        *START_COMMANDS,
    ):
        for position, command in enumerate(commands_of(document.data, key)):
            if match := _OPENS.search(command):
                what = f"`{match.group()}` opens ports"
                yield document.say("unsafe", (key, position), what, TUNNEL)


def _starts(document: Document, key: str) -> list[tuple[int, str]]:
    """The commands that start Ray, each with its position."""
    commands = commands_of(document.data, key)
    return [(at, text) for at, text in enumerate(commands) if _STARTS.search(text)]


def _token(document: Document) -> Iterator[Finding]:
    """Whoever reaches Ray without a token runs what they like on all hosts."""
    for key in START_COMMANDS:
        starts = _starts(document, key)
        if not starts:
            what = "Ray's own commands are taken, which know no token"
            if key.startswith("head"):
                what += " and, on clouds, show the dashboard on every address"
            yield document.say("unsafe", (key,), what, "say them, as in deploy/ray/")
        for position, command in starts:
            before = _STARTS.split(command)[0]
            if TOKEN_MODE not in before:
                what = f"without {TOKEN_MODE} before `ray start` Ray asks nobody for a token"
                fix = f"{TOKEN_MODE} ray start ..."
                yield document.say("unsafe", (key, position), what, fix)
    for key, value in document.data.items():
        told = value if isinstance(value, list) else []
        for position, command in enumerate(told):
            if isinstance(command, str) and _GIVES_AWAY.search(command):
                what = (
                    "a token in a command can be read by every user of the host, and in this file"
                )
                fix = f"file_mounts: {{~/{TOKEN_FILE}: ~/{TOKEN_FILE}}}"
                yield document.say("unsafe", (str(key), position), what, fix)
    mounts = document.data.get("file_mounts")
    paths = [str(path) for path in mounts] if isinstance(mounts, dict) else []
    if not any(path.endswith(TOKEN_FILE) for path in paths):
        what = "the token is not copied to the hosts"
        fix = f"~/{TOKEN_FILE}: ~/{TOKEN_FILE}"
        yield document.say("error", ("file_mounts",), what, fix)


def _dashboard(document: Document) -> Iterator[Finding]:
    for position, command in _starts(document, "head_start_ray_commands"):
        for host in _DASHBOARD.findall(command):
            if host not in LOOPBACK:
                what = f"the dashboard, which can start jobs, listens on {host}"
                fix = "--dashboard-host=127.0.0.1; `distbelief cluster dashboard` comes by SSH"
                path: Path_ = ("head_start_ray_commands", position)
                yield document.say("unsafe", path, what, fix)


# --- what is to be filled in


def _examples(document: Document) -> Iterator[Finding]:
    for path, text in document.texts():
        if path[0] == "provider" and _is_example(text):
            yield document.say("todo", path, f"{text} stands for an address of yours")


def _is_example(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return any(address in net for net in EXAMPLES)


RULES: tuple[Callable[[Document], Iterator[Finding]], ...] = (
    _provider,
    _nodes,
    _hosts,
    _head,
    _counts,
    _resources,
    _ports,
    _token,
    _dashboard,
    placeholders,
    _examples,
)
