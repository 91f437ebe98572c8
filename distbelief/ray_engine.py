"""RayEngine: processes as Ray actors. Only the files called ray_* know Ray; no tensor passes
through it.

Seen with Ray 2.60: an actor that names any resource holds one CPU unless num_cpus is given, and
one that fits nowhere waits for ever without a word, so both are always said, with a time-out.
Restarts are ours to make (max_restarts=0): a restarted shard has to pass through its snapshot. In a
cluster of several hosts so is placement (placement.py): a restart must not go to a host that was
lost a moment ago, which Ray believes in for another minute.
"""

import contextlib
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distbelief.folder import RunFolder
from distbelief.job import Job
from distbelief.outpost import data_paths
from distbelief.placement import Host, Need, Placement, shortage
from distbelief.problem import Problem
from distbelief.process import run_process
from distbelief.ray_hosts import RayHosts, join
from distbelief.spec import Spec

START_TIMEOUT_S = 120.0
LEASE_S = 8.0
"""A shard that the controller has not answered for so long takes nothing: before it is given to
another host (staff.SHARD_SILENCE_S)."""
NOT_SENT = (".git", ".venv", "__pycache__")
"""Of the user's folder, beside what its .gitignore names."""

logger = logging.getLogger(__name__)


class _Seat:
    """An actor that becomes one process of the job."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, spec: str) -> None:
        told = Spec.from_json(spec)
        if not told.cwd:  # on another host: where Ray has put the user's code
            told = replace(told, cwd=os.getcwd())
        # What the user's code prints goes to the same file under every engine.
        with told.out.open("ab") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        run_process(told)


class RayProcess:
    """One actor, running the process as its only long call."""

    is_reachable = True

    def __init__(self, spec: Spec, actor: Any) -> None:  # Any: Ray's actor handle
        self.name = spec.name
        self._actor = actor
        self._running: Any = self._actor.run.remote(spec.to_json())  # Any: Ray's object ref
        self._why: str | None = None

    def poll(self) -> str | None:
        if self._why is None and ray.wait([self._running], timeout=0)[0]:
            try:
                ray.get(self._running, timeout=START_TIMEOUT_S)
                self._why = ""
            except RayError as error:
                self._why = str(error).strip().splitlines()[0]
        return self._why

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)
        if self._why is None:
            self._why = "killed by the launcher"


class PlacedProcess:
    """A process that has its place on some host of a cluster, or waits for one."""

    def __init__(self, spec: Spec, fleet: "Fleet") -> None:
        self.name = spec.name
        self._spec = spec
        self._fleet = fleet
        self._process: RayProcess | None = None
        self._seated: Any = None  # Any: Ray's object ref
        self._host: Host | None = None
        self._asked_at = 0.0
        self._why: str | None = None
        self._take_place()

    @property
    def is_reachable(self) -> bool:
        return self._host is None or self._fleet.hosts.answers(self._host.id)

    def poll(self) -> str | None:
        if self._why is None and self._process is None:
            self._take_place()
        if self._why is None and self._process is not None:
            self._why = self._process.poll() if self._is_seated() else self._why
            if self._why is not None:
                self._leave_host(is_lost=bool(self._why))
        return self._why

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._why is None:
            self._why = "killed by the launcher"
        self._leave_host(is_lost=True)

    def _leave_host(self, *, is_lost: bool) -> None:
        self._fleet.placement.free(self.name)
        if is_lost and self._host is not None:
            self._fleet.hosts.doubt(self._host.id)

    def _take_place(self) -> None:
        found = self._fleet.place(self._spec)
        if found is None:
            return
        self._host, spec = found
        role = self._fleet.placement.needs[spec.role]
        at = NodeAffinitySchedulingStrategy(self._host.id, soft=False)
        actor = _seat(role.cpus, role.gpus, scheduling_strategy=at)
        self._asked_at, self._seated = time.monotonic(), actor.pid.remote()
        self._process = RayProcess(spec, actor)

    def _is_seated(self) -> bool:
        """Ray has started its actor. It is silent about what it waits for."""
        if self._seated is None or ray.wait([self._seated], timeout=0)[0]:
            self._seated = None
            return True
        assert self._host is not None
        assert self._process is not None
        if time.monotonic() - self._asked_at > START_TIMEOUT_S:
            need = self._fleet.placement.needs[self._spec.role].text
            self._process.kill()
            self._why = (
                f"Ray did not start it on {self._host.name} within {START_TIMEOUT_S:.0f} s: is its "
                f"{need} taken by somebody else?"
            )
        return False


class _Spare:
    """An actor that has imported all that a shard needs, and waits to become one.

    It holds no CPU: whoever it takes the place of has given its own back.
    """

    def __init__(self) -> None:
        self.actor = _seat(0.0)
        self._warm: Any = self.actor.pid.remote()  # Any: Ray's object ref

    @property
    def is_ready(self) -> bool:
        return bool(ray.wait([self._warm], timeout=0)[0])


def _seat(num_cpus: float, num_gpus: float = 0.0, **more: Any) -> Any:  # Any: Ray's actor handle
    remote: Any = ray.remote(  # Any: too
        max_restarts=0, max_task_retries=0, num_cpus=num_cpus, num_gpus=num_gpus, **more
    )
    return remote(_Seat).remote()


class Fleet:
    """The hosts of a cluster, and who of a run is where. Used by one thread."""

    def __init__(self, job: Job, hosts: RayHosts) -> None:
        self.hosts = hosts
        where = job.place
        self.placement = Placement(
            {
                "worker": Need(cpus=where.worker_cpus, gpus=job.gpus, tag=where.workers),
                "shard": Need(cpus=where.shard_cpus, tag=where.shards),
            },
            hosts.hosts,
        )
        self._homes: dict[str, str] = {}
        """By shard, the name of the only host that has its snapshots."""
        self._is_stored = bool(job.save.store)
        self._root = _root(job)
        self._left: set[tuple[str, str]] = set()
        self._beside: dict[str, int] = {}
        trial = Placement(self.placement.needs, hosts.hosts)
        for role, number in (("shard", job.shards), ("worker", job.workers)):
            for index in range(number):
                trial.place(f"{role}{index}", role)
        for host in hosts.hosts:
            self._beside[host] = trial.workers_at(host)

    def place(self, spec: Spec) -> tuple[Host, Spec] | None:
        """A host for a process, and what it is told there; None while there is no room."""
        home = self._homes.get(spec.name, "")
        only = next((h.id for h in self.hosts.hosts.values() if h.name == home), home)
        host = self.placement.place(spec.name, spec.role, only)
        if host is None:
            return None
        outlook = self.hosts.outlook(host.id)
        if spec.role == "shard" and not (outlook.is_shared or self._is_stored):
            self._homes[spec.name] = host.name
        beside = max(self._beside.get(host.id, 0), self.placement.workers_at(host.id))
        there = replace(
            spec,
            host=host.address,
            beside=beside,
            lease_s=LEASE_S if spec.role == "shard" else 0.0,
            run_path=outlook.run_path,
        )
        return host, there if host.is_launcher else replace(there, cwd="", job=self._moved(there))

    def _moved(self, spec: Spec) -> str:
        """The job as it is told on another host: the script is where the user's code is there."""
        job = Job.from_json(spec.job)
        path = Path(job.script.path)
        if not (job.script.path and path.is_absolute() and path.is_relative_to(self._root)):
            return spec.job
        moved = replace(job.script, path=str(path.relative_to(self._root)))
        return replace(job, script=moved).to_json()

    def leaving(self) -> list[str]:
        """Processes on hosts that are draining, told once each. Nothing new goes there."""
        found = []
        for host in self.hosts.draining:
            for name, (role, where) in self.placement.places.items():
                can_move = role == "worker" or name not in self._homes
                if where == host and can_move and (host, name) not in self._left:
                    self._left.add((host, name))
                    found.append(name)
        return found


class RayEngine:
    """Starts actors in a Ray cluster of this run's own, or in one that is there already.

    In its own cluster, on this machine, a spare is kept for a shard that is lost: starting an actor
    and importing torch takes seconds.
    """

    name = "ray"

    def __init__(self, job: Job) -> None:
        """Join the cluster at `job.address`; `local` starts one on this machine, which ends with
        `close`. Raises: Problem if Ray cannot be reached or started."""
        self._is_local = job.address == "local"
        self._job = job
        self._spare: _Spare | None = None
        self._fleet: Fleet | None = None
        join(job.address, **(_own_cluster(job) if self._is_local else _sent_code(job)))

    def settle(self, job: Job, folder: RunFolder) -> Job:
        if self._is_local:
            self._check_gpus(job.workers)
            return job
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        hosts = RayHosts(folder.path.resolve())
        hosts.check(data_paths(job.data.source, job.script.path))
        self._fleet = Fleet(job, hosts)
        lacking = shortage(self._fleet.placement, job.shards, job.min_workers or job.workers)
        if lacking:
            raise Problem(
                "DB-ENV-009" if "GPU, the cluster" in lacking else "DB-ENV-002",
                f"the cluster at {job.address} has no room for this run: {lacking}",
                fix="fewer --workers or --shards, --workers MIN:MAX to begin with fewer, or "
                "smaller shares: --set place.worker_cpus=0.5, place.shard_cpus, gpus (0.25: four "
                "on one)",
            )
        if len(hosts.hosts) == 1 or not job.net.is_loopback:
            return job
        # The others have to reach the controller and the monitor.
        return replace(job, net=replace(job.net, host=address))

    def start(self, spec: Spec) -> RayProcess | PlacedProcess:
        try:
            if self._fleet is not None:
                return PlacedProcess(spec, self._fleet)
            gpus = self._job.gpus if spec.role == "worker" else 0.0
            return RayProcess(spec, self._take_spare(spec) or _seat(0.0, gpus))
        except (RayError, GetTimeoutError) as error:
            raise Problem("DB-ENV-003", f"Ray could not start {spec.name}: {error}") from error

    def look(self, now: float) -> None:
        if self._fleet is not None:
            with contextlib.suppress(RayError):  # whoever is lost with Ray is found as lost
                self._fleet.hosts.look(now)

    def leaving(self) -> list[str]:
        return [] if self._fleet is None else self._fleet.leaving()

    def ask_to_end(self, name: str, pid: int) -> None:
        if self._fleet is None:
            os.kill(pid, signal.SIGTERM)
            return
        place = self._fleet.placement.places.get(name)
        if place is not None:
            self._fleet.hosts.tell(place[1], "ask_to_end", pid)

    def close(self) -> None:
        ray.shutdown()

    def _check_gpus(self, num_workers: int) -> None:
        """Ray waits without end, and without a word, for what a cluster does not have."""
        gpus = self._job.gpus
        if not gpus:
            return
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        here = Host(id="here", name="here", address="", cpus=0.0, gpus=resources.get("GPU", 0.0))
        needs = {"worker": Need(cpus=0.0, gpus=gpus), "shard": Need(cpus=0.0)}
        if room := shortage(Placement(needs, {here.id: here}), 0, num_workers):
            raise Problem(
                "DB-ENV-009",
                f"this machine has no room for this run: {room}",
                fix="fewer --workers, a smaller gpus (0.25: four on one), or gpus=0 for the CPU",
            )

    def _take_spare(self, spec: Spec) -> Any | None:  # Any: Ray's actor handle
        """The spare, for a process that may have it; there is soon another one."""
        spare = self._spare
        if not spec.is_warm or (spare is not None and not spare.is_ready):
            return None
        self._spare = _Spare()
        return None if spare is None else spare.actor


def _own_cluster(job: Job) -> dict[str, Any]:  # Any: arguments of ray.init
    return {
        "num_cpus": max(os.cpu_count() or 1, job.workers + job.shards),
        "object_store_memory": 100 * 2**20,  # it holds nothing of ours
        "_node_ip_address": "127.0.0.1",
    }


def _sent_code(job: Job) -> dict[str, Any]:  # Any: arguments of ray.init
    """The folder of the command goes to every host, without what its .gitignore names."""
    root = _root(job)
    excluded = list(NOT_SENT)
    runs = Path(job.run_dir).resolve()
    if runs.is_relative_to(root) and runs != root:
        excluded.append(f"/{runs.relative_to(root)}")
    return {"runtime_env": {"working_dir": str(root), "excludes": excluded}}


def _root(job: Job) -> Path:
    """Of the user's code, on this host."""
    return Path(job.working_dir).expanduser().resolve()
