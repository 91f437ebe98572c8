"""RayHosts: the hosts of a Ray cluster: who is there, who answers, and an outpost on each.

A host counts as long as its outpost answers. Ray itself takes a minute until it says that a machine
is gone, with both copies of an actor alive meanwhile (seen with 2.60), and an actor that is placed
there in that minute never starts.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distbelief.outpost import Outlook, Outpost, versions
from distbelief.placement import Host
from distbelief.problem import Problem

logger = logging.getLogger(__name__)

REACH_TIMEOUT_S = 5.0
LOOK_S = 1.0
"""Between two looks at the cluster, and two questions to an outpost."""
SILENCE_S = 5.0
"""Nothing is placed on a host whose outpost has not answered for so long."""
START_TIMEOUT_S = 120.0
"""For the outposts of the hosts that are there at the start: Ray unpacks the user's code first."""
_COMMON = ("CPU", "GPU", "memory", "object_store_memory")


def join(address: str, **more: Any) -> None:  # Any: arguments of ray.init
    """Join the cluster at an address; `local` starts one on this machine.

    Raises: Problem if Ray cannot be reached or started.
    """
    is_local = address == "local"
    if not is_local:
        _check_reachable(address)
    # Ray puts a handler of its own on SIGTERM, which would end the run without a result.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,  # a bare ray.init() would join whatever runs on this machine
            include_dashboard=False if is_local else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
            **more,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Problem(
            "DB-ENV-001",
            f"Ray could not be {'started' if is_local else f'reached at {address}'}: {error}",
            fix="try again, or do without Ray: --engine local",
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """ray.init waits for minutes, without a word, for a cluster that is not there (seen)."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        if not (host and colon and port.isdecimal()):
            raise ValueError("an address is local, auto, or host:port")
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise Problem(
            "DB-ENV-001",
            f"Ray could not be reached at {address}: {error}",
            fix="is the cluster up (ray status)? To start one for this run: --address local",
        ) from error


class RayHosts:
    """See the top of this file. Used by one thread."""

    def __init__(self, run_path: Path) -> None:
        """run_path: the run's folder on this host, with its launcher.json.

        Raises: Problem if an outpost cannot be set up on a host that is there now.
        """
        self.hosts: dict[str, Host] = {}
        """By id: those that answer, and are there to stay."""
        self.draining: set[str] = set()
        """Ids of hosts that are about to be taken away, as Ray was told."""
        self._run_path = run_path
        self._mark = (run_path / "launcher.json").read_text(encoding="utf-8")
        self._me: str = ray.get_runtime_context().get_node_id()
        self._posts: dict[str, _Post] = {}
        self._looked_at = float("-inf")
        self._wait()

    def look(self, now: float) -> None:
        """See who is there and who answers, and take what is new in the logs."""
        for post in self._posts.values():
            post.look(now, self._run_path / "logs")
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        found = nodes(self._me)
        for host in found.values():
            if host.id not in self._posts:
                self._posts[host.id] = _Post(host, self._run_path, self._mark, now)
        for gone in self._posts.keys() - found.keys():
            del self._posts[gone]
        self.draining = _draining()
        self.hosts.clear()
        self.hosts.update(
            {
                name: post.host
                for name, post in self._posts.items()
                if post.answers(now) and name not in self.draining
            }
        )

    def answers(self, host: str) -> bool:
        """A host, by its id, can be reached."""
        post = self._posts.get(host)
        return post is not None and post.answers(time.monotonic())

    def doubt(self, host: str) -> None:
        """Something was lost on a host: nothing goes there until its outpost has answered anew."""
        self.hosts.pop(host, None)
        if host in self._posts:
            self._posts[host].doubt()

    def outlook(self, host: str) -> Outlook:
        """Of a host that answers."""
        found = self._posts[host].outlook
        assert found is not None
        return found

    def check(self, paths: Mapping[str, str]) -> None:
        """See that all hosts run the same versions, and have the same paths. Raises: Problem."""
        mine = versions()
        for name, post in self._posts.items():
            host, theirs = post.host, self.outlook(name).versions
            if host.is_launcher:
                continue
            differing = [key for key in mine if mine[key] != theirs.get(key)]
            if differing:
                there = ", ".join(f"{key} {theirs.get(key, 'missing')}" for key in differing)
                here = ", ".join(f"{key} {mine[key]}" for key in differing)
                raise Problem(
                    "DB-ENV-011",
                    f"host {host.name} ({host.address}) has {there}; here it is {here}",
                    why="all processes of a run are of the same versions",
                    fix="install the same on every host of the cluster, or use one image",
                )
            for what, path in post.ask("lacks", paths).items():
                raise Problem(
                    "DB-DATA-008",
                    f"{what}, {path}, is not on host {host.name} ({host.address})",
                    why="every host that trains reads it from its own disk, or a shared one",
                    fix="copy it there, mount it on every host, name a URL (wds:s3://...), or keep "
                    "it in the folder of the command, which goes to every host",
                )

    def tell(self, name: str, what: str, *values: Any) -> None:  # Any: as of the outpost's methods
        """Have an outpost do something, without waiting for it."""
        post = self._posts.get(name)
        if post is not None:
            getattr(post.actor, what).remote(*values)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            now = time.monotonic()
            self._looked_at = float("-inf")
            self.look(now)
            silent = [post for name, post in self._posts.items() if name not in self.hosts]
            if not silent:
                return
            for post in silent:
                if post.failure or now > deadline:
                    raise Problem(
                        "DB-ENV-010",
                        f"host {post.host.name} ({post.host.address}) cannot be used: "
                        + (post.failure or f"no answer within {START_TIMEOUT_S:.0f} s"),
                        fix="is distbelief installed there, in the Python that Ray runs with? "
                        "(ray status; distbelief doctor --cluster)",
                    )
            time.sleep(0.05)


class _Post:
    """The outpost on one host, as it is called from here."""

    def __init__(self, host: Host, run_path: Path, mark: str, now: float) -> None:
        self.host = host
        self.outlook: Outlook | None = None
        self.failure = ""
        """Why there is none; empty while that is not known."""
        self._given = (run_path.name, str(run_path), mark)
        self._told: dict[str, int] = {}
        """Bytes of each log that have come here."""
        self._heard_at = float("-inf")
        self._asked_at = now
        self._begin()

    def _begin(self) -> None:
        at: Any = NodeAffinitySchedulingStrategy(self.host.id, soft=False)  # Any: Ray's types
        remote: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=at)
        self.actor: Any = remote(Outpost).remote(*self._given)  # Any: Ray's actor handle
        self._open: Any = self.actor.outlook.remote()  # Any: Ray's object ref

    def answers(self, now: float) -> bool:
        return self.outlook is not None and now - self._heard_at < SILENCE_S

    def doubt(self) -> None:
        self._heard_at = float("-inf")
        if self.outlook is not None:
            self._open = None  # what is on its way may have been said before

    def ask(self, what: str, *values: Any) -> Any:  # Any: as of the outpost's methods
        """Raises: Problem if there is no answer."""
        try:
            return ray.get(getattr(self.actor, what).remote(*values), timeout=START_TIMEOUT_S)
        except RayError as error:
            text = f"host {self.host.name} does not answer: {first_line(error)}"
            raise Problem("DB-ENV-010", text) from error

    def look(self, now: float, logs: Path) -> None:
        """Take the answer to the last question, if it is there, and ask the next one."""
        if self._open is None:
            if now - self._asked_at >= LOOK_S:
                self._asked_at, self._open = now, self.actor.news.remote(self._told)
            return
        if not ray.wait([self._open], timeout=0)[0]:
            return
        told, self._open = self._open, None
        try:
            answer = ray.get(told, timeout=LOOK_S)
        except RayError as error:
            self.failure = first_line(error)
            logger.error("the outpost on %s: %s", self.host.name, self.failure)
            if self.outlook is not None:  # it was there: another one takes its place
                self._begin()
            return
        self._heard_at = now
        if isinstance(answer, Outlook):
            self.outlook, self.failure = answer, ""
            return
        for name, data in answer.items():
            with (logs / name).open("ab") as file:
                file.write(data)
            self._told[name] = self._told.get(name, 0) + len(data)


def nodes(me: str) -> dict[str, Host]:
    """The hosts that Ray holds for alive, by id."""
    found = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]  # Ray does not annotate it
        if not node["Alive"]:
            continue
        resources: Mapping[str, float] = node["Resources"]
        own = [name for name in resources if name not in _COMMON and ":" not in name]
        labels = node.get("Labels") or {}
        found[node["NodeID"]] = Host(
            id=node["NodeID"],
            name=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            tags=frozenset([*own, *labels.values()]),
            is_launcher=node["NodeID"] == me,
        )
    return found


def _draining() -> set[str]:
    try:
        told: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    except (AttributeError, RayError, RuntimeError):  # no public way to ask is known
        return set()
    return set(told)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
