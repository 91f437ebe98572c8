"""Spectator: the launcher's side of the monitor: starts its process, tells it of the run, and lets
it go. Nothing here waits for it but its start, and the run goes on without one that cannot be had.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distbelief.chronicle import AnyEntry, Begin, End, Event, RunReport, encode
from distbelief.job import Job
from distbelief.param_server.curve import Keys
from distbelief.param_server.secret import Secret
from distbelief.supervisor import Supervisor

logger = logging.getLogger(__name__)

MONITOR = "monitor"
COMMAND = (sys.executable, "-m", "distbelief.monitor.process")
START_TIMEOUT_S = 15.0
"""For it to listen; later ones are not waited for."""
PROVEN_S = 20.0
"""One that has served for so long has done what it is there for."""
RESTARTS = 8
END_TIMEOUT_S = 5.0
BUFFER_MAX = 8 * 2**20
"""Bytes that it has not read; lines beyond that are dropped and counted. A look at 10,000 workers
has 1.5 MB."""
PIPE_BYTES = 2**20
"""What it may leave unread before anything waits here: Linux gives 64 KiB unless asked."""


class Spectator:
    """See the top of this file. Used by one thread."""

    def __init__(
        self,
        job: Job,
        run: str,
        run_path: Path,
        token: Secret,
        keys: Keys | None,
        begin: Begin,
        say: Callable[[str], None],
        command: Sequence[str] = COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """keys: of the monitor's process; None where nothing is encrypted. begin: told first, to
        each process anew."""
        self.endpoint = ""
        """Where reports go; empty where nobody takes any."""
        self.url = ""
        """With its secret: for the run's owner."""
        self.num_restarts = 0
        self.num_dropped = 0
        """Lines that it has not read in time."""
        self._job = job
        self._run = run
        self._run_path = run_path
        self._token = token
        self._keys = keys
        self._access = Secret(secrets.token_hex(16)) if job.monitor.access else Secret("")
        self._begin = begin
        self._say = say
        self._command = command
        self._clock = clock
        self._supervisor = Supervisor(RESTARTS)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._started_at = 0.0
        self._heard = b""
        self._out = bytearray()
        self._last: RunReport | None = None
        """Told to a process that is started again, so that it knows where the run is."""
        self._port = job.monitor.port
        self._feed_port = 0

    def start(self) -> None:
        """Start the process, without waiting for it."""
        if self._job.monitor.on:
            self._spawn()

    def wait(self) -> None:
        """Until it listens, or has failed to: processes are told where it is as they start."""
        deadline = self._clock() + START_TIMEOUT_S
        while not self._is_ready:
            if self._process is None and not self._supervisor.is_waiting(MONITOR):
                return
            if self._clock() > deadline:
                self._give_up(f"it does not listen after {START_TIMEOUT_S:.0f} s")
                return
            self._read(0.05)
            self.look()

    def tell(self, entry: AnyEntry) -> None:
        """Tell something of the run. Never waits."""
        if isinstance(entry, RunReport):
            self._last = entry
        if self._process is None:
            return
        line = encode(entry)
        if len(self._out) + len(line) > BUFFER_MAX:
            self.num_dropped += 1
            return
        self._out += line
        self._write()

    def look(self) -> None:
        """See that it lives, and start it again where it does not."""
        if not self._job.monitor.on:
            return
        now = self._clock()
        process = self._process
        if process is None:
            if self._supervisor.due(now):
                self._spawn()
            return
        self._write()
        self._read(0.0)
        if self._process is None:
            return
        if self._is_ready and now - self._started_at > PROVEN_S:
            self._supervisor.prove(MONITOR)
        code = process.poll()
        if code is not None:
            self._close_pipes(process)
            self._process, self._is_ready = None, False
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._lose(why)

    def close(self, result: dict[str, Any] | None, wall: float) -> None:  # Any: JSON
        """Tell how the run ended, and let the process end by itself, or end it."""
        if result is not None:
            if result.get("error"):
                text = str(result["error"].get("text", ""))[:400]
                self.tell(Event(at=wall, kind="error", who="", text=text))
            self.tell(End(at=wall, result=result))
        process, self._process = self._process, None
        if process is None:
            return
        deadline = self._clock() + END_TIMEOUT_S
        while self._out and process.poll() is None and self._clock() < deadline:
            self._process = process
            self._write()
            self._process = None
            time.sleep(0.01)
        self._close_pipes(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - self._clock()))
        process.kill()
        process.wait()

    # Inside

    def _spawn(self) -> None:
        self._heard, self._is_ready = b"", False
        self._started_at = self._clock()
        log = self._run_path / "logs" / f"{MONITOR}.out"
        try:
            with log.open("ab") as out:
                self._process = process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    start_new_session=True,  # the terminal's Ctrl-C does not reach it
                )
        except OSError as error:
            self._give_up(str(error))
            return
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # else lines go out in more and smaller writes
            with contextlib.suppress(OSError):
                fcntl.fcntl(process.stdin.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._out = bytearray(json.dumps(self._config()).encode() + b"\n" + encode(self._begin))
        if self._last is not None:
            self._out += encode(self._last)
        self._write()

    def _config(self) -> dict[str, Any]:  # Any: JSON
        """What it has to know; with secrets, for its standard input and nothing else."""
        monitor = self._job.monitor
        return {
            "run": self._run,
            "run_path": str(self._run_path.resolve()),
            "token": str.__str__(self._token),
            "keys": None if self._keys is None else self._keys.to_dict(),
            "host": monitor.host,
            "port": monitor.port,
            "wish": self._port,
            "hosts": list(monitor.hosts),
            "feed_host": self._job.net.host,
            "feed_wish": self._feed_port,
            "access": str.__str__(self._access),
            "actions": monitor.actions,
            "root_path": monitor.root_path,
            "log": list(monitor.log),
            "per_worker": monitor.per_worker,
            "num_workers": self._job.workers,
            "log_file": str(self._run_path.resolve() / "logs" / f"{MONITOR}.log"),
            "replay": False,
        }

    def _write(self) -> None:
        process = self._process
        if process is None or process.stdin is None or not self._out:
            return
        try:
            del self._out[: os.write(process.stdin.fileno(), self._out)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ValueError):  # seen when it is looked after
            self._out.clear()

    def _read(self, timeout_s: float) -> None:
        """Take its one line, if it is there."""
        process = self._process
        if process is None or process.stdout is None or self._is_ready:
            if timeout_s:
                time.sleep(timeout_s)
            return
        descriptor = process.stdout.fileno()
        poll = select.poll()  # `select` knows no descriptor above 1023: a large run has them
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            return
        with contextlib.suppress(BlockingIOError):
            self._heard += os.read(descriptor, 65_536)
        line, end, _ = self._heard.partition(b"\n")
        if not end:
            return
        try:
            told = json.loads(line)
            if "error" in told:
                error = told["error"]
                self._give_up(": ".join(filter(None, (error.get("what"), error.get("why")))))
                return
            url, feed = str(told["url"]), str(told["feed"])
        except (ValueError, KeyError, TypeError, AttributeError):
            self._give_up("it does not say where it listens")
            return
        is_first = not self.url
        if self.endpoint not in ("", feed):
            logger.warning("the monitor moved to %s: running workers do not find it", feed)
        self.url, self.endpoint, self._is_ready = url, feed, True
        self._port = urlsplit(url).port or 0
        self._feed_port = int(feed.rpartition(":")[2])
        if is_first:
            self._say(f"dashboard {url}")

    def _lose(self, why: str) -> None:
        if self._supervisor.lose(MONITOR, why, self._clock()) is None:
            self._say(
                f"the monitor is lost ({self._supervisor.cause(MONITOR)}) and is not started "
                f"again; the run goes on: see {self._run_path / 'logs' / MONITOR}.log"
            )
        else:
            self.num_restarts += 1
            logger.info("the monitor is lost (%s): it is started again", why)

    def _give_up(self, why: str) -> None:
        process, self._process = self._process, None
        self._supervisor.forget()
        if process is not None:
            self._close_pipes(process)
            process.kill()
            process.wait()
        self._say(f"no dashboard: the monitor cannot be started ({why}); the run goes on")

    @staticmethod
    def _close_pipes(process: "subprocess.Popen[bytes]") -> None:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
