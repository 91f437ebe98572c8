"""Trial: one run under a plan of faults, from its launch to its verdict."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distbelief.chaos import gradients
from distbelief.chaos.nemesis import Nemesis, anon_of
from distbelief.chaos.plan import Plan
from distbelief.chaos.proxy import Proxy
from distbelief.chaos.verdict import Verdict
from distbelief.folder import RunFolder, all_runs
from distbelief.problem import Problem

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 180.0
CHECK_TIMEOUT_S = 600.0
TICK_S = 0.05

OUR_JOB = (
    gradients.__file__,
    *("--engine", "local", "--workers", "4", "--shards", "2"),
    *("--set", "save.every_s=0.3", "--set", "save.backup_mb=128", "--set", "warm_workers=true"),
    # The plan kills each of them over and over; a person would want to be told.
    *("--set", "restarts=50", "--no-dashboard"),
)
PAUSE_S = 0.05
"""Between two pushes of a worker of our job."""


def our_job(engine: str) -> list[str]:
    """2 shards of 4 MiB and 4 workers with gradients of whole numbers."""
    args = [engine if arg == "local" else arg for arg in OUR_JOB]
    return [*args, "--", str(gradients.TOTAL), str(PAUSE_S)]


@dataclass(slots=True)
class Trial:
    """See the top of this file. Used once, by one thread."""

    args: Sequence[str]
    """What `distbelief launch` is called with; after a -- those of a script."""
    plan: Plan
    parent: Path
    """Where its run folder is made; a folder of its own."""
    has_gradients: bool
    """They are of gradients.py, so that the checker can make them again."""
    say: Callable[[str], None]
    environ: dict[str, str] = field(default_factory=dict)
    """Added to the run's environment."""
    _proxies: dict[str, Proxy] = field(default_factory=dict)

    def run(self) -> Verdict:
        """Raises: Problem if the run does not begin, or nothing can be checked."""
        self.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._run()
        finally:
            for proxy in self._proxies.values():
                proxy.close()

    def _run(self) -> Verdict:
        base = _base_memory()
        with (self.parent / "launch.log").open("wb") as log:
            launch = subprocess.Popen(
                [sys.executable, "-m", "distbelief", "launch", *self._all_args()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **self.environ},
            )
        try:
            folder = self._wait_until_training(launch)
            self.say(f"run {folder.path} trains; faults for {self.plan.seconds:.0f} s")
            nemesis = Nemesis(folder, self.plan, base, self._proxies)
            nemesis.torment(lambda: launch.poll() is not None)
            folder.ask_stop("safe")
            out, _ = launch.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise Problem(
                "DB-RUN-013",
                f"the run did not end within {STOP_TIMEOUT_S:.0f} s after it was asked to",
                fix=f"see {self.parent}",
            ) from error
        finally:
            _end(launch)
        verdict = self._check(folder)
        verdict.run = str(folder.path)
        verdict.num_left_out = nemesis.num_left_out
        result = _last_json(out)
        if launch.returncode not in (0, 128 + signal.SIGINT) or result.get("error"):
            verdict.violations.append(f"the run has failed: {result.get('error')}")
        if self.is_spaced and verdict.lost:
            verdict.violations.append(
                f"I1: {verdict.lost} parts of acknowledged pushes are lost, though no two faults "
                "met"
            )
        (folder.path / "verdict.json").write_text(verdict.to_json() + "\n", encoding="utf-8")
        return verdict

    @property
    def is_spaced(self) -> bool:
        """Nothing may be lost."""
        kills = [kind for kind in self.plan.faults if kind.kind == "kill"]
        return all(kind.spaced for kind in kills)

    def _all_args(self) -> list[str]:
        args = list(self.args)
        cut = args.index("--") if "--" in args else len(args)
        own = ["--run-dir", str(self.parent), "--set", "save.history=true", "--json"]
        if self.plan.needs_proxies:
            own += self._stand_between(_num_shards(args[:cut]))
        return [*args[:cut], *own, *args[cut:]]

    def _stand_between(self, num_shards: int) -> list[str]:
        """Have the shards listen on known ports, and a proxy before each. Returns arguments."""
        base = _free_ports(1 + num_shards)
        self._proxies = {f"shard{i}": Proxy(partial(int, base + 1 + i)) for i in range(num_shards)}
        ports = [f'"127.0.0.1:{proxy.port}"' for proxy in self._proxies.values()]
        return ["--set", f"net.port={base}", "--set", f"net.announce=[{', '.join(ports)}]"]

    def _wait_until_training(self, launch: "subprocess.Popen[bytes]") -> RunFolder:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and launch.poll() is None:
            runs = all_runs(self.parent)
            if runs and (runs[-1].status or {}).get("state") == "training":
                return runs[-1]
            time.sleep(TICK_S)
        log = (self.parent / "launch.log").read_text(encoding="utf-8", errors="replace")
        if launch.poll() is None:
            what = f"the run has not begun to train within {START_TIMEOUT_S:.0f} s"
        else:
            what = f"the run has ended with exit code {launch.returncode} before it could train"
        raise Problem(
            "DB-RUN-013",
            what,
            why="\n".join(log.strip().splitlines()[-6:]),
            fix="does it run without faults? distbelief launch " + " ".join(self.args),
        )

    def _check(self, folder: RunFolder) -> Verdict:
        self.say(f"checking the history of {folder.path}")
        more = ["--gradients"] if self.has_gradients else []
        done = subprocess.run(
            [sys.executable, "-m", "distbelief.chaos.checker", str(folder.path), *more],
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
        )
        try:
            return Verdict.from_json(done.stdout.decode().strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise Problem(
                "DB-RUN-013",
                f"the history of {folder.path} cannot be checked",
                why="\n".join(lines[-3:]),
            ) from error


def _num_shards(args: Sequence[str]) -> int:
    """Shards that a launch with these arguments has, as --dry-run says."""
    done = subprocess.run(
        [sys.executable, "-m", "distbelief", "launch", *args, "--dry-run", "--json"],
        capture_output=True,
        check=False,
    )
    plan = _last_json(done.stdout)
    if "shards" not in plan:
        raise Problem(
            "DB-RUN-013",
            "the job cannot be launched",
            why=done.stderr.decode(errors="replace").strip(),
        )
    return int(plan["shards"])


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has.

    Below those that the kernel gives to outgoing connections: one of these may take a shard's
    port while the shard is dead.
    """
    for _ in range(100):
        first = random.randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise Problem("DB-ENV-005", f"there are no {count} free ports in a row")


def _base_memory() -> int:
    """Bytes that a process has of its own which has imported what a shard needs."""
    code = "import os, distbelief.process; print(os.getpid(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        base = anon_of(process.pid)
        process.communicate("\n")
    return base


def _end(launch: "subprocess.Popen[bytes]") -> None:
    if launch.poll() is None:
        launch.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launch.wait(timeout=20)
    if launch.poll() is None:
        launch.kill()
        launch.wait()


def _last_json(out: bytes) -> dict[str, Any]:  # Any: JSON
    try:
        data = json.loads(out.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": "it told no result"}
    return dict(data)
