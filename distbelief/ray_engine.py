"""RayEngine: processes as Ray actors. The only file that knows Ray; no tensor passes through it.

Seen with Ray 2.60: an actor that names any resource holds one CPU unless num_cpus is given, and
one that fits nowhere waits for ever without a word, so both are always said, with a time-out.
Restarts are ours to make (max_restarts=0): a restarted shard has to pass through its snapshot.
"""

import logging
import os
import signal
import socket
import threading
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from distbelief.problem import Problem
from distbelief.process import run_process
from distbelief.spec import Spec

START_TIMEOUT_S = 60.0
REACH_TIMEOUT_S = 5.0


class _Host:
    """An actor that becomes one process of the job."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, spec: str) -> None:
        told = Spec.from_json(spec)
        # What the user's code prints goes to the same file under every engine.
        with told.out.open("ab") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
        run_process(told)


class RayProcess:
    """One actor, running the process as its only long call."""

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


class _Spare:
    """An actor that has imported all that a shard needs, and waits to become one.

    It holds no CPU: whoever it takes the place of has given its own back.
    """

    def __init__(self) -> None:
        self.actor = _host(0.0)
        self._warm: Any = self.actor.pid.remote()  # Any: Ray's object ref

    @property
    def is_ready(self) -> bool:
        return bool(ray.wait([self._warm], timeout=0)[0])


def _host(num_cpus: float, num_gpus: float = 0.0) -> Any:  # Any: Ray's actor handle
    remote: Any = ray.remote(  # Any: too
        max_restarts=0, max_task_retries=0, num_cpus=num_cpus, num_gpus=num_gpus
    )
    return remote(_Host).remote()


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


class RayEngine:
    """Starts actors in a Ray cluster of this run's own, or in one that is there already.

    A spare is kept for a shard that is lost: starting an actor and importing torch takes seconds.
    """

    name = "ray"

    def __init__(self, address: str, num_workers: int, num_shards: int, gpus: float = 0.0) -> None:
        """address: `local` starts a cluster on this machine, which ends with `close`. gpus: of each
        worker, whole ones or a share of one.

        Raises: Problem if Ray cannot be reached or started.
        """
        # A bare ray.init() would join whatever cluster happens to run on this machine.
        is_local = address == "local"
        if not is_local:
            _check_reachable(address)
        self._num_cpus = 0.0 if is_local else 1.0
        self._gpus = gpus
        self._spare: _Spare | None = None
        local: dict[str, Any] = {}  # Any: arguments of ray.init
        if is_local:
            local = {
                "num_cpus": max(os.cpu_count() or 1, num_workers + num_shards),
                "object_store_memory": 100 * 2**20,  # it holds nothing of ours
                "_node_ip_address": "127.0.0.1",
            }
        # Ray puts a handler of its own on SIGTERM, which would end the run without a result.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=address,
                include_dashboard=False if is_local else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=False,
                **local,
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
        nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray does not annotate it
        if not is_local and len(nodes) > 1:
            self.close()
            raise Problem(
                "DB-ENV-002",
                f"the cluster at {address} has several machines, and this version places all "
                "processes of a run on one",
                fix="start Ray on one machine",
            )

        self._check_gpus(address, num_workers)

    def _check_gpus(self, address: str, num_workers: int) -> None:
        """Ray waits without end, and without a word, for what a cluster does not have."""
        if not self._gpus:
            return
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        there = resources.get("GPU", 0.0)
        # A worker's share is of one GPU, so 0.6 for two of them need two.
        room = there // self._gpus if self._gpus >= 1 else there * (1 // self._gpus)
        if num_workers > room:
            self.close()
            raise Problem(
                "DB-ENV-009",
                f"{num_workers} workers with {self._gpus:g} GPU each were asked for, and the "
                f"cluster at {address} has {there:g} GPU: room for {room:g}",
                fix="fewer --workers, a smaller gpus (0.25: four on one), or gpus=0 for the CPU",
            )

    def start(self, spec: Spec) -> RayProcess:
        try:
            gpus = self._gpus if spec.role == "worker" else 0.0
            return RayProcess(spec, self._take_spare(spec) or _host(self._num_cpus, gpus))
        except (RayError, GetTimeoutError) as error:
            raise Problem("DB-ENV-003", f"Ray could not start {spec.name}: {error}") from error

    def _take_spare(self, spec: Spec) -> Any | None:  # Any: Ray's actor handle
        """The spare, for a process that may have it; there is soon another one."""
        spare = self._spare
        if not spec.is_warm or (spare is not None and not spare.is_ready):
            return None
        self._spare = _Spare()
        return None if spare is None else spare.actor

    def close(self) -> None:
        ray.shutdown()
