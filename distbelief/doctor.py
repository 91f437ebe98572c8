"""Doctor: is this machine ready for a run? Each check says what it found, and how to mend it.

A check looks, and a function beside it judges what was found; nothing is left behind. Torch and Ray
are looked at in processes of their own: importing them takes seconds, and may fail in its own way.
"""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distbelief.environment import OLDEST, PYTHON_MIN, numbers

OK, WARN, BAD = "ok", "warn", "bad"
MARKS = {OK: "✓", WARN: "!", BAD: "✗"}
DASHBOARD_PORT = 8787
FILES_WANTED = 8192
"""Descriptors that thousands of workers need; see open_files.py."""
SHARED_WANTED = 256 * 2**20
DISK_WANTED = 2**30
LOOPBACK_WANTED = 0.3e9
"""Bytes a second: less would be felt with the smallest models."""
CHILD_S = 30.0
MOVED_BYTES = 32 * 2**20
CLOCK_S = 0.2
CLOCK_OFF_S = 0.05
CHILD = "import json, sys; {code}"
TORCH = (
    "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(json.dumps([torch.__version__, [torch.cuda.get_device_name(i) for i in range(n)]]))"
)
RAY = "import ray, ray.scripts.scripts; print(json.dumps([ray.__version__]))"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one thing."""

    name: str
    level: str
    """ok; warn: runs work, but not all, or not well; bad: they do not."""
    text: str
    fix: str = ""

    @property
    def line(self) -> str:
        return f"{MARKS[self.level]} {self.name:<10} {self.text}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(run_dir: Path, host: str, ports: list[int]) -> list[Check]:
    """All checks, those that take long beside each other. ports: that runs will listen on."""
    looks: list[Callable[[], Check]] = [
        lambda: judge_python(sys.version_info[:3]),
        lambda: look_at_torch(),
        lambda: look_at_ray(),
        lambda: judge_libraries(found_versions()),
        lambda: look_at_curve(),
        lambda: judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        lambda: look_at_shared_memory(),
        lambda: look_at_folder(run_dir),
        lambda: judge_ports(host, {port: is_free(host, port) for port in (DASHBOARD_PORT, *ports)}),
        lambda: look_at_name(),
        lambda: look_at_clock(),
        lambda: judge_loopback(loopback_rate()),
        lambda: look_at_limits(),
    ]
    with ThreadPoolExecutor(4) as pool:
        return [done.result() for done in [pool.submit(_safely, look) for look in looks]]


def _safely(look: Callable[[], Check]) -> Check:
    """A check that fails in a way that nobody foresaw is a finding too."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - the other checks are to be told all the same
        return Check("doctor", WARN, f"a check failed: {type(error).__name__}: {error}")


# Libraries


def judge_python(found: tuple[int, ...]) -> Check:
    text = ".".join(map(str, found))
    if found[:2] < PYTHON_MIN:
        least = ".".join(map(str, PYTHON_MIN))
        return Check("python", BAD, f"{text}: {least} or newer is needed", f"use Python {least}")
    return Check("python", OK, text)


def found_versions() -> dict[str, str | None]:
    """Of what is not looked at by itself; None: not installed."""
    found: dict[str, str | None] = {}
    for name in (*(name for name in OLDEST if name not in ("torch", "ray")), "msgspec", "aiohttp"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def judge_libraries(found: Mapping[str, str | None]) -> Check:
    missing = [name for name, text in found.items() if text is None]
    old = [
        f"{name} {text}"
        for name, text in found.items()
        if text is not None and numbers(text) < OLDEST.get(name, ())
    ]
    text = ", ".join(f"{name} {text}" for name, text in found.items() if text is not None)
    if missing or old:
        odd = "; ".join(
            filter(None, [f"missing: {', '.join(missing)}" if missing else "",
                          f"too old: {', '.join(old)}" if old else ""])
        )  # fmt: skip
        return Check("libraries", BAD, odd, "pip install --upgrade distbelief")
    return Check("libraries", OK, text)


def look_at_torch() -> Check:
    return judge_torch(*in_child(TORCH))


def judge_torch(told: Any, error: str) -> Check:  # Any: JSON
    if told is None:
        return Check("torch", BAD, f"cannot be imported: {error}", "pip install torch")
    text, devices = str(told[0]), list(told[1])
    if numbers(text) < OLDEST["torch"]:
        least = ".".join(map(str, OLDEST["torch"]))
        return Check("torch", BAD, f"{text} is too old", f"pip install 'torch>={least}'")
    cuda = f"CUDA: {', '.join(devices)}" if devices else "no CUDA device: workers use the CPU"
    return Check("torch", OK, f"{text}; {cuda}")


def look_at_ray() -> Check:
    try:
        found = version("ray")
    except PackageNotFoundError:
        return judge_ray(None, "", "")
    told, error = in_child(RAY)
    return judge_ray(found, "" if told is not None else error, version("click"))


def judge_ray(found: str | None, error: str, click: str) -> Check:
    """error: what importing Ray's command line gave. It breaks with some versions of click."""
    if found is None:
        return Check("ray", WARN, "not installed", "pip install ray, or use --engine local")
    if error:
        return Check(
            "ray",
            WARN,
            f"{found} with click {click} cannot be imported: {error}",
            "pip install --upgrade ray, or use --engine local",
        )
    if numbers(found) < OLDEST["ray"]:
        return Check("ray", WARN, f"{found} is too old", "pip install --upgrade ray")
    return Check("ray", OK, f"{found}, works with click {click}")


def in_child(code: str) -> tuple[Any, str]:  # Any: JSON
    """(what a piece of Python prints as JSON, or None; then why)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(code=code)],
            capture_output=True,
            text=True,
            timeout=CHILD_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    try:
        return json.loads(done.stdout.splitlines()[-1]), ""
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return None, lines[-1][:200]


def look_at_curve() -> Check:
    import zmq

    return judge_curve(zmq.zmq_version(), bool(zmq.has("curve")))


def judge_curve(zmq: str, has_curve: bool) -> Check:
    if not has_curve:
        return Check(
            "encryption",
            WARN,
            f"ZeroMQ {zmq} has no CURVE: runs stay on this machine",
            "pip install --force-reinstall pyzmq: its wheels have libsodium",
        )
    return Check("encryption", OK, f"ZeroMQ {zmq} with CURVE")


# The machine


def judge_files(soft: int, hard: int) -> Check:
    """Of open files."""
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        return Check("files", OK, f"{soft} open files, raised to {_limit(hard)} where needed")
    workers = max(0, (hard - 200) // 2)
    return Check(
        "files",
        WARN,
        f"{hard} open files are allowed: enough for {workers} workers",
        f"ulimit -Hn {FILES_WANTED} as root, or LimitNOFILE={FILES_WANTED} of its service",
    )


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else str(number)


def look_at_shared_memory() -> Check:
    descriptor = os.memfd_create("distbelief-doctor")
    try:
        os.truncate(descriptor, 4096)
        other = os.open(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDWR)
        os.close(other)
        is_shared, why = True, ""
    except OSError as error:
        is_shared, why = False, str(error)
    finally:
        os.close(descriptor)
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    return judge_shared_memory(is_shared, why, free)


def judge_shared_memory(is_shared: bool, why: str, free: int) -> Check:
    """is_shared: other processes can open our memory. free: bytes in /dev/shm, for loaders."""
    if not is_shared:
        return Check(
            "memory",
            WARN,
            f"memory cannot be shared through /proc: {why}",
            "allow it, or --set net.shared_memory=false: gradients then go over TCP",
        )
    if free < SHARED_WANTED:
        return Check(
            "memory",
            WARN,
            f"/dev/shm has {free / 2**20:.0f} MiB free, which data loaders may need",
            "docker run --shm-size=2g, or --set data.loaders=0",
        )
    return Check("memory", OK, f"can be shared; /dev/shm has {free / 2**30:.1f} GiB free")


def look_at_folder(folder: Path) -> Check:
    """Write, sync and rename as snapshots do, in the folder or the nearest above it that exists."""
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix=".distbelief-doctor-", dir=place) as made:
            part, whole = Path(made) / "part", Path(made) / "whole"
            with part.open("wb") as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
            part.rename(whole)
            if whole.stat().st_size != 2**20:
                raise OSError("what was written is not there")
        free = shutil.disk_usage(place).free
    except OSError as error:
        return judge_folder(folder, str(error), 0, 0.0)
    return judge_folder(folder, "", free, time.monotonic() - began)


def judge_folder(folder: Path, error: str, free: int, seconds: float) -> Check:
    if error:
        return Check(
            "run folder",
            BAD,
            f"{folder} cannot be written: {error}",
            "mend its permissions, or name another place with --run-dir",
        )
    if free < DISK_WANTED:
        return Check(
            "run folder",
            WARN,
            f"{folder} has {free / 2**20:.0f} MiB free",
            "free some space, or name another place with --run-dir",
        )
    text = f"{folder}: 1 MiB written, synced and renamed in {1e3 * seconds:.0f} ms"
    return Check("run folder", OK, f"{text}, {free / 2**30:.0f} GiB free")


def is_free(host: str, port: int) -> bool:
    """Whether somebody could listen there. Raises: OSError for an address that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            if error.errno == 98:  # address already in use
                return False
            raise
    return True


def judge_ports(host: str, free: Mapping[int, bool]) -> Check:
    """The dashboard takes another port where its own is taken; net.port and those after it not."""
    fixed = [port for port, is_it in free.items() if not is_it and port != DASHBOARD_PORT]
    if fixed:
        taken = ", ".join(map(str, fixed))
        return Check(
            "ports", BAD, f"taken at {host}: {taken}", "choose another net.port, or leave it out"
        )
    if not free.get(DASHBOARD_PORT, True):
        return Check(
            "ports",
            WARN,
            f"{DASHBOARD_PORT} is taken: a dashboard takes any free one",
            "choose one with --set monitor.port=8788 if it must be the same each time",
        )
    return Check("ports", OK, f"free at {host}: {', '.join(map(str, free))}")


def look_at_name() -> Check:
    name = socket.gethostname()
    try:
        found = sorted({str(row[4][0]) for row in socket.getaddrinfo(name, None)})
    except OSError as error:
        return judge_name(name, [], str(error))
    return judge_name(name, found, "")


def judge_name(name: str, found: list[str], error: str) -> Check:
    if not found:
        return Check(
            "host name",
            WARN,
            f"{name} has no address: {error}. Ray needs one",
            f"add '127.0.0.1 {name}' to /etc/hosts, or use --engine local",
        )
    return Check("host name", OK, f"{name} is {', '.join(found[:3])}")


def look_at_clock() -> Check:
    """Does wall time go as fast as time does? One that is being set does not."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(CLOCK_S)
    return judge_clock((time.time() - wall) - (time.monotonic() - steady), wall)


def judge_clock(off_s: float, wall: float) -> Check:
    if abs(off_s) > CLOCK_OFF_S:
        return Check(
            "clock",
            WARN,
            f"wall time went {1e3 * off_s:+.0f} ms wrong in {CLOCK_S} s: it is being set",
            "wait until the clock is right (chronyc tracking), or times of logs will not fit",
        )
    if wall < 1.7e9:
        return Check("clock", WARN, f"it is not {time.ctime(wall)}", "set the clock")
    return Check("clock", OK, "wall time goes evenly")


def loopback_rate() -> float:
    """Bytes a second through one TCP connection to ourselves, roughly."""
    block = bytes(2**20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)

        def send() -> None:
            with socket.create_connection(server.getsockname(), timeout=5.0) as out:
                for _ in range(MOVED_BYTES // len(block)):
                    out.sendall(block)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5.0)
                began, got, room = time.monotonic(), 0, bytearray(2**20)
                while size := connection.recv_into(room):
                    got += size
                return got / max(1e-9, time.monotonic() - began)
        finally:
            thread.join()


def judge_loopback(rate: float) -> Check:
    text = f"{rate / 1e9:.1f} GB/s through TCP"
    if rate < LOOPBACK_WANTED:
        return Check(
            "loopback", WARN, f"{text}: slow", "is the machine busy? distbelief bench limits"
        )
    return Check("loopback", OK, text)


def look_at_limits() -> Check:
    return judge_limits(read_limits(Path("/sys/fs/cgroup")), os.cpu_count() or 1)


def read_limits(root: Path) -> dict[str, float]:
    """(cpus, memory in bytes) that this container may use, where they are limited."""
    found: dict[str, float] = {}
    for name, key, scale in (
        ("cpu.max", "cpus", 0.0),
        ("memory.max", "memory", 1.0),
        ("memory/memory.limit_in_bytes", "memory", 1.0),
    ):
        try:
            words = (root / name).read_text().split()
            if words[0] == "max":
                continue
            found[key] = float(words[0]) / float(words[1]) if not scale else float(words[0])
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return {key: value for key, value in found.items() if value < 2**60}


def judge_limits(limits: Mapping[str, float], cores: int) -> Check:
    cpus, memory = limits.get("cpus"), limits.get("memory")
    words = [f"{cores} cores"]
    if cpus is not None:
        words.append(f"of which {cpus:.1f} may be used")
    words.append("memory not limited" if memory is None else f"{memory / 2**30:.1f} GiB of memory")
    text = ", ".join(words)
    if cpus is not None and cpus < 2:
        return Check(
            "limits", WARN, text, "give the container 2 cores, one for each worker: --cpus=2"
        )
    if memory is not None and memory < 2 * 2**30:
        return Check("limits", WARN, text, "each process needs some 0.4 GiB: --memory=4g")
    return Check("limits", OK, text)
