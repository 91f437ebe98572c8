"""MonitorProcess: the process that watches a run, and serves what it sees.

    standard input    its configuration, one line of JSON, then the chronicle; it ends with it
    standard output   one line of JSON: where it serves, or why it does not

One thread: the loop's. Every PULSE_S it takes what reports and lines there are, once a second it
closes a second of the Store. It is the only place of the monitor that knows the time. Where the
process itself was stopped for a while it says so: what others were doing then is not known.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from distbelief.chronicle import AnyEntry, Event, decode
from distbelief.folder import RunFolder
from distbelief.monitor.access import Access, is_wildcard
from distbelief.monitor.api import Api, log_end
from distbelief.monitor.collector import Collector
from distbelief.monitor.http import Server, listen
from distbelief.monitor.line import Lines
from distbelief.monitor.link import Link
from distbelief.monitor.loggers import Loggers
from distbelief.monitor.metrics import Metrics
from distbelief.monitor.pages import Pages
from distbelief.monitor.recording import Recording
from distbelief.monitor.report import Report
from distbelief.monitor.scene import history_s, scene
from distbelief.monitor.simulate import Simulation
from distbelief.monitor.source import Json
from distbelief.monitor.store import Store
from distbelief.monitor.stream import Stream
from distbelief.open_files import allow_files
from distbelief.param_server.curve import DoorkeeperFailed, Keys
from distbelief.param_server.report import AnyReport
from distbelief.problem import Problem

logger = logging.getLogger(__name__)

PULSE_S = 0.25
GC_AFTER = 50_000
"""Objects: a second of reports is a good part of that, and has no cycles."""
TAKE_S = 0.2
"""For what has come, before browsers are served again."""
STOPPED_S = 3.0
"""A pulse that is so late was not only waiting for the processor."""
STDIN_BYTES = 2**20
CONFIG_MAX = 2**20
FINISH_S = 2.5
"""For loggers, at the end: with what it lingers, less than the launcher waits."""
BAD_MAX = 20
"""Lines that are no chronicle are logged so often."""

_IN, _OUT = 0, 1


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """A run that never was."""

    workers: int
    seed: int = 0
    past_s: float = 0.0
    """How much of it is there from the beginning; 0 for as much as is quick."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What it is told first."""

    run: str = ""
    run_path: str = ""
    """Of the run's folder; empty for none."""
    token: str = ""
    keys: dict[str, Any] | None = None  # Any: see Keys
    host: str = "127.0.0.1"
    port: int = 0
    wish: int = 0
    """The port that it had before."""
    hosts: list[str] = []
    feed_host: str = "127.0.0.1"
    feed_wish: int = 0
    access: str = ""
    """The secret that browsers must have; empty for none."""
    actions: bool = False
    root_path: str = ""
    log: list[str] = []
    log_file: str = ""
    per_worker: int = 256
    num_workers: int = 0
    replay: bool = False
    """Show the recording of a run that is over."""
    simulate: Simulated | None = None
    linger_s: float = 2.0
    """After the launcher has gone."""


class Monitor:
    """See the top of this file."""

    def __init__(self, config: Config) -> None:
        """Raises: Problem where it cannot listen, or has nothing to show."""
        self.config = config
        self._folder = RunFolder(Path(config.run_path)) if config.run_path else None
        is_live = not config.replay
        self.store = Store(actions=config.actions, live=is_live)
        self._recording = None if self._folder is None else Recording(self._folder.path / "metrics")
        if self._recording is not None:
            # Of a monitor before this one, or of the attempt before.
            if not self._recording.load(self.store) and config.replay:
                raise nothing_recorded(RunFolder(Path(config.run_path)))
            if is_live:
                self._recording.watch(self.store)
        self._loggers = Loggers(config.log if is_live else ())
        self._metrics = Metrics(config.per_worker, self._loggers.counts) if is_live else None
        self._sock = listen(config.host, config.port, config.wish)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._collector: Collector | None = None
        try:
            access = self._make_access()
            if is_live and config.simulate is None:
                self._context, self._collector = self._collect()
        except BaseException:
            self._sock.close()
            raise
        self.stream = Stream(self.store)
        pages = Pages()
        api = Api(
            self.store,
            self.stream,
            self._folder,
            actions=config.actions and is_live,
            scrape=self._metrics,
            report=Report(pages, self._log_end, time.time),
        )
        self._server = Server(api, access, pages, config.root_path)
        self._lines = Lines()
        self._num_bad = 0
        self._is_told = True
        """The launcher still has the other end of standard input."""
        self._is_stopping = False
        self._second = 0

    @property
    def url(self) -> str:
        """As it is printed, with the secret in it."""
        host, port = self._sock.getsockname()[:2]
        if is_wildcard(host):
            host = socket.gethostname()
        name = f"[{host}]" if ":" in host else host
        key = f"?k={self.config.access}" if self.config.access else ""
        return f"http://{name}:{port}{self.config.root_path}/{key}"

    async def run(self, ready: Callable[[Json], None]) -> None:
        """Serve until it is over. ready: is told where."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        link = Link.of_this_process(self.url, self._collector.endpoint if self._collector else "")
        keeps_link = self._folder is not None and not self.config.replay
        try:
            await self._server.start(self._sock)
            if keeps_link and self._folder is not None:
                link.write(self._folder.path)
            ready({"url": link.url, "feed": link.feed, "pid": link.pid})
            gc.freeze()  # what is there now stays; looking through it again and again is in vain
            gc.set_threshold(GC_AFTER, 20, 50)
            if self.config.simulate is not None:
                await self._play(self.config.simulate)
            elif self.config.replay:
                while not self._is_stopping:
                    await asyncio.sleep(PULSE_S)
            else:
                await self._live()
            self.stream.end("stopped" if self._is_stopping else "ended", time.time())
        finally:
            if keeps_link and self._folder is not None:
                link.remove(self._folder.path)
            await self._server.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            self.close()

    def close(self) -> None:
        """What was opened here."""
        self._sock.close()
        if self._collector is not None:
            self._collector.close()
            self._collector = None
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    # A run that goes on

    async def _live(self) -> None:
        os.set_blocking(_IN, False)
        beat_at, end_at = time.monotonic(), float("inf")
        while not self._is_stopping:
            now, late_s = time.time(), time.monotonic() - beat_at - PULSE_S
            beat_at = time.monotonic()
            if late_s > STOPPED_S:
                self._say_stopped(late_s, now)
            is_all = self._take(now)
            if not self._is_told and end_at == float("inf"):
                end_at = beat_at + self.config.linger_s
            if beat_at >= end_at:
                break
            self._tell(now)
            # As long as there is more, only browsers are let in between.
            await asyncio.sleep(PULSE_S if is_all else 0.0)
        self._take(time.time())
        self._tell(time.time() + 1.0)  # also what came in this second
        self._record(is_end=True)  # first: the launcher does not wait for long
        self._loggers.finish(self.store, FINISH_S)

    def _tell(self, now: float) -> None:
        """Tell viewers what is new, and close the second if it is over."""
        if int(now) != self._second:
            self._second = int(now)
            self.store.advance(now)
            self.stream.publish_tick(now)
            self._server.wake()
            self._loggers.tick(self.store, now)
            self._record()
        elif self.stream.publish(now):
            self._server.wake()

    def _take(self, now: float) -> bool:
        """Take what has come. Returns: whether that was all."""
        deadline = time.monotonic() + TAKE_S
        if self._is_told:
            self._read(now)
        collector = self._collector
        while collector is not None:
            junk = collector.counts.total()
            report = collector.recv(0.0)
            if report is not None:
                self._hear(report, now)
            elif collector.counts.total() == junk:
                return True
            if time.monotonic() > deadline:
                return False
        return True

    def _read(self, now: float) -> None:
        try:
            data = os.read(_IN, STDIN_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._is_told = False
            logger.info("the launcher has said all")
        for line in self._lines.feed(data):
            try:
                entry = decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                self._num_bad += 1
                if self._num_bad <= BAD_MAX:
                    logger.warning("a line that is no chronicle: %s", error)
                continue
            self._hear(entry, now)

    def _hear(self, message: AnyReport | AnyEntry, now: float) -> None:
        self.store.take(message, now)
        self._loggers.take(message)
        if self._metrics is not None:
            self._metrics.take(message)

    def _say_stopped(self, late_s: float, now: float) -> None:
        text = f"the monitor was stopped for {late_s:.0f} s: what happened then is not known"
        logger.warning("%s", text)
        self.store.take(Event(at=now, kind="state", who="", text=text), now)

    def _record(self, *, is_end: bool = False) -> None:
        if self._recording is None:
            return
        try:
            if is_end:
                self._recording.save(self.store, self.store.now)
            else:
                self._recording.save_if_due(self.store, self.store.now)
        except OSError as error:
            logger.warning("the recording cannot be written: %s", error)

    # A run that never was

    async def _play(self, simulated: Simulated) -> None:
        past_s = simulated.past_s or history_s(simulated.workers)
        start = float(int(time.time() - past_s))
        simulation = scene(simulated.workers, simulated.seed, start, past_s)
        played = 0
        while not self._is_stopping:
            deadline = time.monotonic() + TAKE_S
            while played < int(time.time() - start) and time.monotonic() < deadline:
                played += 1
                self._play_second(simulation, start, played)
            now = time.time()
            is_behind = played < int(now - start)
            if int(now) != self._second and played:
                self._second = int(now)
                self.stream.publish_tick(now)
                self._server.wake()
            await asyncio.sleep(0.0 if is_behind else PULSE_S)

    def _play_second(self, simulation: Simulation, start: float, second: int) -> None:
        for message in simulation.until(float(second)):
            self._hear(message, message.at)
        self.store.advance(start + second)

    # Inside

    def _log_end(self, name: str, num_lines: int) -> str:
        return "" if self._folder is None else log_end(self._folder, name, num_lines)

    def _make_access(self) -> Access:
        config = self.config
        port = self._sock.getsockname()[1]
        names = [socket.gethostname()] if is_wildcard(config.host) else []
        hosts = [*config.hosts, *(f"{name}:{port}" for name in names)]
        try:
            if config.actions and not config.access:
                raise ValueError("with actions there must be a secret")
            return Access(config.access, config.host, port, hosts)
        except ValueError as error:
            raise Problem(
                "DB-ENV-008",
                f"the monitor does not serve: {error}",
                fix="leave monitor.access on, and look at monitor.host and monitor.hosts",
            ) from error

    def _collect(self) -> "tuple[zmq.Context[zmq.Socket[bytes]], Collector]":
        config = self.config
        allow_files(config.num_workers)
        keys = None if config.keys is None else Keys.from_dict(config.keys)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            return context, Collector(
                context, config.run, config.token, config.feed_host, config.feed_wish, keys
            )
        except (OSError, zmq.ZMQError, DoorkeeperFailed) as error:
            context.destroy(linger=0)
            raise Problem(
                "DB-ENV-005",
                f"the monitor cannot take reports at {config.feed_host}: {error}",
                why="is that an address of this machine?",
                fix="look at net.host",
            ) from error

    def _stop(self) -> None:
        self._is_stopping = True


def nothing_recorded(folder: RunFolder) -> Problem:
    return Problem(
        "DB-RUN-017",
        f"run {folder.run} has no recording",
        why="its monitor was off (monitor.on), or was lost before it had written anything",
        fix=f"distbelief status {folder.run} and distbelief logs {folder.run} say what is known",
    )


def read_config(descriptor: int) -> Config | None:
    """The first line; None if there is none.

    Byte by byte, as what follows it is for others to read. Raises: msgspec.DecodeError.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        one = os.read(descriptor, 1)
        if not one or len(line) > CONFIG_MAX:
            return None
        line += one
    return msgspec.json.decode(bytes(line), type=Config)


def say(data: Json) -> None:
    """The one line of standard output."""
    with contextlib.suppress(BrokenPipeError):
        os.write(_OUT, json.dumps(data).encode() + b"\n")


def main() -> None:
    """Entry of the process."""
    try:
        config = read_config(_IN)
    except msgspec.DecodeError as error:
        say({"error": {"code": "DB-BUG-001", "what": f"its configuration: {error}"}})
        sys.exit(1)
    if config is None:
        return
    logging.basicConfig(
        filename=config.log_file or None,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    try:
        monitor = Monitor(config)
    except Problem as problem:
        logger.error("%s", problem)
        told = {"code": problem.code, "what": problem.what, "why": problem.why}
        say({"error": {**told, "fix": problem.fix}})
        sys.exit(problem.exit_code)
    except Exception as error:
        logger.exception("the monitor cannot begin")
        say({"error": {"code": "DB-BUG-001", "what": f"{type(error).__name__}: {error}"}})
        sys.exit(1)
    code = 0
    try:
        logger.info("the monitor pid=%d serves", os.getpid())
        asyncio.run(monitor.run(say))
    except Exception:
        logger.exception("the monitor failed")
        code = 1
    logging.shutdown()
    os._exit(code)  # whoever ends this process waits for no thread of a library's


if __name__ == "__main__":
    main()
