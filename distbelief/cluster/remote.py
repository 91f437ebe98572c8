"""Remote: Ray's own commands and SSH, as processes of this machine that reach a cluster's hosts."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distbelief.cluster.cluster_file import provider_of
from distbelief.cluster.document import Document
from distbelief.problem import Problem

LOOPBACK = "127.0.0.1"
CONNECT_S = 15
STOP_S = 90.0
MARK = "--- what is left"

# What Ray starts: its programs lie in its package, and processes that have renamed themselves.
_OF_RAY = re.compile(
    r"^ray::|^ray-|/ray/core/src/ray/|/ray/(?:dashboard|autoscaler|_private|util)/"
    r"|\bray\.util\.client\.server\b"
)
# Launchers, and what belongs to them; not `distbelief cluster`, which is looking.
_OF_RUNS = re.compile(r"(?:^|/|-m )distbelief(?:\.[\w.]+)?(?= |$)(?!.* cluster )")
# As Ray's own: hosts of a cluster come and go, and their addresses are given to others.
_SSH = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What `down` found on a host: of Ray, and of runs that are not Ray's to end, such as those of
    `--engine local`. error: it could not be looked at."""

    address: str
    left: Sequence[str] = ()
    runs: Sequence[str] = ()
    error: str = ""

    @property
    def is_clean(self) -> bool:
        return not self.left and not self.error

    @property
    def text(self) -> str:
        if self.error:
            return f"{self.address}  not known: {self.error}"
        text = f"left: {'; '.join(self.left)}" if self.left else "no process of Ray is left"
        if self.runs:
            text += f"; distbelief runs there: {'; '.join(self.runs)}"
        return f"{self.address}  {text}"


def ray_command(*args: str) -> list[str]:
    """Ray's command line in this Python; -P: a ray.py in the current folder is not meant."""
    return [sys.executable, "-P", "-m", "ray.scripts.scripts", *args]


def environment() -> dict[str, str]:
    """Of Ray's commands: it sends nothing home unless the user has said so."""
    return {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", **os.environ}


def run_ray(*args: str) -> None:
    """Run a command of Ray's and let it speak. Raises: Problem if it fails."""
    _need("ssh", "rsync")
    done = subprocess.run(ray_command(*args), env=environment(), check=False)
    if done.returncode:
        raise Problem(
            "DB-CLUSTER-005",
            f"`ray {' '.join(args)}` ended with {done.returncode}",
            fix="what it said last is above; the same command goes on where it stopped",
        )


def hosts_of(document: Document) -> list[str]:
    """Of provider local: the head, then the others."""
    provider = provider_of(document)
    return [str(provider.get("head_ip")), *map(str, provider.get("worker_ips") or [])]


def ssh_command(document: Document, host: str, *args: str) -> list[str]:
    """The command line that logs in, with the file's own user and key. args: more of ssh's, then
    what to run there."""
    auth = document.data.get("auth") or {}
    options = [*_SSH, f"ConnectTimeout={CONNECT_S}", "BatchMode=yes"]
    if proxy := auth.get("ssh_proxy_command"):
        options.append(f"ProxyCommand={proxy}")
    words = ["ssh", *(word for option in options for word in ("-o", option))]
    if key := auth.get("ssh_private_key"):
        words += ["-i", str(Path(str(key)).expanduser())]
    user = auth.get("ssh_user")
    return [*words, f"{user}@{host}" if user else host, *args]


def login_shell(command: str) -> str:
    """A command in a shell as Ray's launcher uses: its start-up files say where ray is.

    Those of many systems do nothing in a shell that is not interactive; one that is complains,
    before it runs anything, that it has no terminal.
    """
    inner = f"exec 2>&3 3>&-; source ~/.bashrc; {command}"
    return f"bash --login -i -c {shlex.quote(inner)} 3>&2 2>/dev/null"


# Ray stops, has a moment to be gone, and what is left is listed.
_STOP = login_shell(
    f"ray stop --force >/dev/null 2>&1; sleep 1; echo '{MARK}'; ps -u $(id -u) -o pid=,args= -ww"
)


def stop_all(document: Document) -> list[HostReport]:
    """End Ray on every host of provider local, and look what is left of it.

    `ray down` ends it on the head alone (seen with 2.60). The head goes first: its autoscaler would
    start the others again.
    """
    _need("ssh")
    head, *others = hosts_of(document)
    return [*_stop(document, [head]), *_stop(document, others)]


def _stop(document: Document, hosts: Sequence[str]) -> list[HostReport]:
    started = [
        subprocess.Popen(
            ssh_command(document, host, _STOP),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    ]
    return [_report(host, process) for host, process in zip(hosts, started, strict=True)]


def _report(host: str, process: "subprocess.Popen[str]") -> HostReport:
    try:
        out, err = process.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return HostReport(address=host, error=f"no answer in {STOP_S:g} s")
    if MARK not in out:
        lines = err.strip().splitlines()
        return HostReport(address=host, error=lines[-1] if lines else f"ssh: {process.returncode}")
    listed = out.partition(MARK)[2]
    return HostReport(address=host, left=ray_processes(listed), runs=run_processes(listed))


def ray_processes(listed: str) -> list[str]:
    """Of the lines of `ps`, number and command line, those that Ray has started."""
    return _matching(listed, _OF_RAY)


def run_processes(listed: str) -> list[str]:
    """Those of distbelief itself that are not Ray's."""
    return _matching(listed, _OF_RUNS)


def _matching(listed: str, pattern: re.Pattern[str]) -> list[str]:
    pairs = [line.strip().partition(" ")[::2] for line in listed.splitlines()]
    told = [(pid, command.strip()) for pid, command in pairs if pid.isdecimal()]
    return [f"{pid} {command[:80]}" for pid, command in told if pattern.search(command)]


def see_free(port: int) -> None:
    """Raises: Problem if something listens on this port of the loopback already."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise Problem(
                "DB-CLUSTER-007",
                f"port {port} of this machine cannot be had: {error.strerror}",
                fix="end what listens there, or take another one: --local-port",
            ) from error


def forward(document: Document, file: Path, remote_port: int, local_port: int) -> list[str]:
    """The command line that brings a port of the head's loopback to this machine's, until it ends.

    For provider local it is plain ssh. Elsewhere only the cloud knows the head's address, so Ray is
    asked: `ray dashboard` brings any port here, through ssh as well.
    """
    if provider_of(document).get("type") == "local":
        way = f"{LOOPBACK}:{local_port}:{LOOPBACK}:{remote_port}"
        command = ssh_command(document, hosts_of(document)[0])
        return [command[0], "-N", "-o", "ExitOnForwardFailure=yes", "-L", way, *command[1:]]
    ports = ("--port", str(local_port), "--remote-port", str(remote_port))
    return ray_command("dashboard", *ports, str(file))


def run_until_interrupted(command: Sequence[str]) -> None:
    """Until Ctrl-C, or the command ends by itself. Raises: Problem if that was an error."""
    _need("ssh")
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        raise Problem("DB-CLUSTER-007", f"the tunnel ended with {code}", fix="is the cluster up?")


def ask_head(document: Document, file: Path, command: str) -> str:
    """What a command says on the head. Raises: Problem if it fails."""
    words = ray_command("exec", "--no-config-cache", str(file), command)
    if provider_of(document).get("type") == "local":
        words = ssh_command(document, hosts_of(document)[0], login_shell(command))
    done = subprocess.run(
        words, env=environment(), capture_output=True, text=True, check=False, timeout=STOP_S
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        what = f"`{command}` ended with {done.returncode} on the head"
        raise Problem("DB-CLUSTER-005", what, lines[-1] if lines else "", "is the cluster up?")
    return done.stdout


def _need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise Problem(
            "DB-CLUSTER-010",
            f"{', '.join(missing)} is not installed here, which Ray's launcher needs",
            fix="apt-get install openssh-client rsync",
        )
