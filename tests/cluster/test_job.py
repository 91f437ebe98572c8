"""A job on four hosts: placed, encrypted, cut and healed; nothing that was acknowledged is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts, missing
from tests.helpers.runs import TINY

NAMES = ["head", "ps-1", "ps-2", "w-1", "w-2"]
HEAD, PS_1, PS_2, W_1, W_2 = 1, 2, 3, 4, 5
JOB = Path("/run/job")
"""A folder that each host has of its own, as /run is."""


class Cluster:
    """Ray on hosts, started by hand, and one run of a job from the head."""

    def __init__(self, hosts: Hosts, store: Path) -> None:
        self.hosts = hosts
        self.store = store
        self.run: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """All but w-2."""
        at_head = ("--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        self._start_ray(HEAD, *at_head)
        for number, tag in ((PS_1, "ps"), (PS_2, "ps"), (W_1, "worker")):
            self.join(number, tag)

    def join(self, number: int, tag: str) -> None:
        """Another host comes."""
        head = f"--address={self.hosts[HEAD].address}:6379"
        self._start_ray(number, head, "--num-cpus=2", f'--resources={{"{tag}": 1}}')

    def _start_ray(self, number: int, *more: str) -> None:
        ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats")
        mine = f"--node-ip-address={self.hosts[number].address}"
        self._do(number, *ray, "--object-store-memory=100000000", mine, *more)

    def drain(self, number: int) -> None:
        """Tell Ray that a host is about to be taken away, as whoever rents it out does."""
        ask = (
            "import ray, sys; ray.init('auto', logging_level='ERROR'); "
            "names = {n['NodeManagerHostname']: n['NodeID'] for n in ray.nodes()}; "
            "print(names[sys.argv[1]])"
        )
        node = self._do(HEAD, sys.executable, "-c", ask, NAMES[number - 1]).split()[-1]
        self._do(
            HEAD,
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
            *("--address", f"{self.hosts[HEAD].address}:6379", "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
            *("--deadline-remaining-seconds", "300"),
        )

    def launch(self, *more: str) -> None:
        self._do(HEAD, "mkdir", "-p", str(JOB))
        self._do(HEAD, "sh", "-c", f"cat > {JOB}/tiny.py", input=TINY)
        command = f"cd {JOB} && exec {sys.executable} -m distbelief launch --address auto"
        flags = "--model tiny:Slow --set data.image_size=8 --batch-size 16 --lr 0.05 --json"
        said = f"--set save.store={self.store} --set save.every_s=2 --workers 1:2 --shards 2"
        self.run = self.hosts.popen(
            HEAD,
            "bash",
            "-c",
            f"{command} {flags} {said} {' '.join(more)} 2> {JOB}/err",
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self, name: str) -> Any:  # Any: JSON
        """A file of the run's folder on the head; None where it is not there yet."""
        found = self.hosts.run(
            HEAD,
            "sh",
            "-c",
            f"cat {JOB}/runs/*/{name}",
            capture_output=True,
            text=True,
            check=False,
        )
        with contextlib.suppress(ValueError):
            return json.loads(found.stdout)
        return None

    def where(self) -> dict[str, str]:
        """The host of each process."""
        rows = self.read("processes.json") or []
        return {row["name"]: row["host"] for row in rows}

    @property
    def samples(self) -> int:
        status = self.read("status.json")
        return 0 if status is None else int(status["samples"])

    def wait(self, what: str, is_so: Callable[[], bool], seconds: float) -> float:
        """Seconds until it is so."""
        assert self.run is not None
        began = time.monotonic()
        while not is_so():
            if self.run.poll() is not None or time.monotonic() - began > seconds:
                said = self._do(
                    HEAD, "sh", "-c", f"cat {JOB}/err; tail -n 5 {JOB}/runs/*/logs/*.log"
                )
                pytest.fail(f"{what}: not within {seconds:.0f} s\n{said[-9000:]}")
            time.sleep(0.5)
        return time.monotonic() - began

    def trains(self, seconds: float = 90.0) -> float:
        """Seconds until the run goes on from where it is now."""
        now = self.samples
        return self.wait("the run goes on", lambda: self.samples > now + 64, seconds)

    def stop(self) -> dict[str, Any]:  # Any: JSON
        """The result, after a safe stop."""
        assert self.run is not None
        self._do(HEAD, "bash", "-c", f"cd {JOB} && {sys.executable} -m distbelief stop")
        out, _ = self.run.communicate(timeout=120)
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def _do(self, number: int, *command: str, **how: Any) -> str:  # Any: of subprocess.run
        done = self.hosts.run(
            number, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
        )
        assert done.returncode == 0, f"{command}: {done.stdout}"
        return str(done.stdout)


@pytest.fixture
def cluster(tmp_path: Path, repo_root: Path) -> Iterator[Cluster]:
    why = missing()
    if why is not None:
        pytest.skip(f"no hosts: {why}")
    env = {"PYTHONPATH": str(repo_root), "RAY_USAGE_STATS_ENABLED": "0"}
    with Hosts.up(len(NAMES), tmp_path / "hosts", env, NAMES) as hosts:
        made = Cluster(hosts, tmp_path / "store")
        yield made
    if made.run is not None:  # it has ended with its host
        made.run.communicate()


@pytest.fixture
def training(cluster: Cluster) -> Cluster:
    """A run that trains, its processes where they belong."""
    cluster.begin()
    cluster.launch("--until", "1h", "--no-dashboard")
    cluster.wait("the run trains", lambda: cluster.samples > 200, 180)
    where = cluster.where()
    assert {where["shard0"], where["shard1"]} == {"ps-1", "ps-2"}
    assert {where["w0"], where["w1"]} == {"w-1"}
    return cluster


def check(result: dict[str, Any]) -> None:
    """Every sample has one fate, and nothing that was acknowledged is lost."""
    assert (result["exit"], result["error"]) == ("stopped", None)
    assert result["lost_double_fault"] == 0
    assert result["accounting"]["adds_up"] is True
    assert result["samples"] > 200


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_worker_host_is_cut_and_healed(training: Cluster):
    begins = f"grep -c begins {JOB}/runs/*/logs/w0.log"  # written on w-1, into a folder of its own
    read = training.hosts.run(HEAD, "sh", "-c", begins, capture_output=True, text=True)
    assert read.stdout == "1\n"
    training.hosts.cut(W_1)
    time.sleep(20)
    training.hosts.heal(W_1)
    print(f"worker host back {training.trains(120):.1f} s after the heal")  # noqa: T201
    result = training.stop()
    check(result)
    assert result["workers_lost"] == 2


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_shard_host_is_cut_and_its_shard_goes_on_elsewhere(training: Cluster):
    lost = next(name for name, host in training.where().items() if host == "ps-2")
    training.hosts.cut(PS_2)
    back = training.wait(f"{lost} is back", lambda: training.where().get(lost) == "ps-1", 120)
    print(f"{lost} is back {back:.1f} s after the cut")  # noqa: T201
    training.trains(60)
    training.hosts.heal(PS_2)
    training.wait(
        "the old copy has ended",
        lambda: not any("_Seat" in text for text in training.hosts.processes(PS_2).values()),
        60,
    )
    training.trains()
    result = training.stop()
    check(result)
    assert (result["shard_restarts"], result["workers_lost"]) == (1, 0)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_host_comes_and_others_are_drained(training: Cluster):
    training.join(W_2, "worker")
    training.drain(W_1)
    moved = training.wait(
        "the workers are on w-2",
        lambda: [training.where().get(name) for name in ("w0", "w1")] == ["w-2", "w-2"],
        120,
    )
    print(f"workers moved {moved:.1f} s after the notice")  # noqa: T201
    training.trains(60)
    training.drain(PS_2)
    moved = training.wait(
        "both shards are on ps-1",
        lambda: [training.where().get(name) for name in ("shard0", "shard1")] == ["ps-1"] * 2,
        120,
    )
    print(f"shard moved {moved:.1f} s after the notice")  # noqa: T201
    training.trains(60)
    result = training.stop()
    check(result)
    assert (result["workers_lost"], sorted(result["drained"])) == (0, ["w0", "w1"])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_hosts_that_die_with_all_that_is_on_them(training: Cluster):
    """Also the one that has the shard's newest snapshots."""
    training.join(W_2, "worker")
    lost = next(name for name, host in training.where().items() if host == "ps-2")
    for number in (PS_2, W_1):
        os.kill(training.hosts[number].pid, signal.SIGKILL)
    back = training.wait(
        "all are elsewhere",
        lambda: (
            training.where().get(lost) == "ps-1"
            and [training.where().get(name) for name in ("w0", "w1")] == ["w-2", "w-2"]
        ),
        150,
    )
    print(f"elsewhere {back:.1f} s after their hosts died")  # noqa: T201
    training.trains(60)
    result = training.stop()
    check(result)
    assert (result["shard_restarts"], result["workers_lost"]) == (1, 2)
