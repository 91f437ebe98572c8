"""Hosts: several hosts on this one machine, as network namespaces that are reached by SSH.

    sudo python tests/cluster/hosts.py up 3 --env PYTHONPATH=$PWD
    sudo python tests/cluster/hosts.py exec 2 hostname
    sudo python tests/cluster/hosts.py rate 2 100     # megabits a second, both ways; 0 takes it off
    sudo python tests/cluster/hosts.py cut 2          # its cable is pulled
    sudo python tests/cluster/hosts.py heal 2
    sudo python tests/cluster/hosts.py list           # addresses, the key, the processes of each
    sudo python tests/cluster/hosts.py down

A host has a network, processes, a hostname, a HOME, a /run, a /dev/shm and a /tmp/ray of its own,
and sshd on port 22; it shares the other files, so the code and the interpreter are there already.
Its first process is sshd: when that is killed the kernel kills all others of the host, so `down`
leaves nothing. This machine is the hosts' gateway (10.77.N.254) and has the only key to them. What
one set of hosts is made of is written in its folder (--folder); several sets get different N.

Nothing here is known to distbelief: only the standard library and click. Needs root, iproute2,
util-linux, openssh and rsync (which `ray up` calls).
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

TOOLS = ("ip", "tc", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen", "rsync")
SBIN = ("/usr/sbin", "/sbin")
READY_S = 20.0
GONE_S = 10.0
SHM_SIZE = "2g"
BURST, LATENCY = "256kb", "50ms"
"""Of tc's token bucket: with these 1 Gbit/s is reached, and a full queue holds 50 ms."""


class HostsError(Exception):
    """Hosts could not be made, or are not there."""


def missing() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in TOOLS if _which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (iproute2, util-linux, openssh-server, rsync)"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of them. Numbers begin with 1."""

    number: int
    name: str
    address: str
    pid: int
    """Its first process, as this machine sees it."""

    home: Path


@dataclass(slots=True, kw_only=True)
class Hosts:
    """A set of hosts; also a context manager that takes them down."""

    folder: Path
    net: int
    env: dict[str, str]
    hosts: dict[int, Host]
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    # --- making and finding them

    @classmethod
    def up(
        cls,
        num: int,
        folder: Path,
        env: Mapping[str, str] | None = None,
        names: Sequence[str] = (),
    ) -> "Hosts":
        """Make so many, and wait until each lets in by SSH. env: of their logins and of `popen`.
        names: theirs, by which they know each other; h1, h2, ... where there are none.

        Raises: HostsError.
        """
        why = missing()
        if why is not None:
            raise HostsError(why)
        if not 1 <= num <= 250:
            raise HostsError(f"{num} hosts do not fit into one network")
        if (folder / "state.json").exists():
            raise HostsError(f"there are hosts of {folder} already: take them down first")
        named = [*names, *(f"h{number}" for number in range(len(names) + 1, num + 1))][:num]
        (folder / "ssh").mkdir(parents=True, exist_ok=True)
        hosts = cls(folder=folder, net=_claim_net(), env=dict(env or {}), hosts={})
        hosts._write()  # so that down finds what is half made
        try:
            hosts._make(named)
        except BaseException:
            hosts.down()
            raise
        return hosts

    @classmethod
    def find(cls, folder: Path) -> "Hosts":
        """Those that are up. Raises: HostsError if there are none."""
        try:
            told = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise HostsError(f"no hosts of {folder} are up") from error
        found = {
            one["number"]: Host(**(one | {"home": Path(one["home"])})) for one in told["hosts"]
        }
        return cls(folder=folder, net=told["net"], env=told["env"], hosts=found)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- what one can do with them

    @property
    def key(self) -> Path:
        """The private key that opens every host, for root."""
        return self.folder / "ssh" / "id"

    @property
    def gateway(self) -> str:
        """This machine, as the hosts see it."""
        return f"10.77.{self.net}.254"

    def __getitem__(self, number: int) -> Host:
        if number not in self.hosts:
            raise HostsError(f"there is no host {number}, only {sorted(self.hosts)}")
        return self.hosts[number]

    def command(self, number: int, args: Sequence[str]) -> list[str]:
        """The command line that runs args on a host, in this process's working directory."""
        host = self[number]
        env = {"HOME": str(host.home), "PATH": _path(), "USER": "root", **self.env}
        within = ["env", "-C", os.getcwd(), *(f"{key}={value}" for key, value in env.items())]
        return [_tool("nsenter"), "-t", str(host.pid), "-a", *within, *args]

    def run(self, number: int, *args: str, **how: Any) -> subprocess.CompletedProcess[Any]:
        """subprocess.run on a host. Any: its arguments."""
        return subprocess.run(self.command(number, args), **how)

    def popen(self, number: int, *args: str, **how: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen on a host. Any: its arguments. What is killed by it is nsenter alone."""
        return subprocess.Popen(self.command(number, args), **how)

    def ssh(self, number: int, *command: str) -> list[str]:
        """The command line that logs in from this machine."""
        quiet = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        options = [word for one in quiet for word in ("-o", one)]
        return ["ssh", "-i", str(self.key), *options, f"root@{self[number].address}", *command]

    def processes(self, number: int) -> dict[int, str]:
        """What runs on a host, by this machine's process numbers, without the first, its sshd."""
        host = self[number]
        return {p: text for p, text in _processes_of(host.pid).items() if p != host.pid}

    def cut(self, number: int) -> None:
        """Pull the cable: nothing comes in or goes out, and nobody is told."""
        _run("ip", "link", "set", self._cable(self[number].number), "down")

    def heal(self, number: int) -> None:
        _run("ip", "link", "set", self._cable(self[number].number), "up")

    def rate(self, number: int, mbit: float) -> None:
        """Let so many megabits a second through, in and out; 0: as many as there are."""
        out = ("-n", self._netns(self[number].number))
        for where, device in ((out, "eth0"), ((), self._cable(number))):
            _run("tc", *where, "qdisc", "del", "dev", device, "root", check=False)
            if mbit:
                bucket = ("rate", f"{mbit:g}mbit", "burst", BURST, "latency", LATENCY)
                _run("tc", *where, "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def down(self) -> None:
        """Kill all that runs on them and take them away, as far as they are there; twice is well.

        Raises: HostsError if something is left.
        """
        inits = [host.pid for host in self.hosts.values() if _is_ours(host.pid)]
        for pid in inits:
            os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.kill()  # unshare: only where its child did not get as far as being told of
            process.wait(GONE_S)
        _wait(lambda: not any(_is_alive(pid) for pid in inits), "the hosts' processes", GONE_S)
        for name in _links_and_namespaces(self.net):
            _run("ip", *name, check=False)
        left = _links_and_namespaces(self.net)
        if left:
            raise HostsError(f"could not be removed: {left}")
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # Ray of this machine itself uses it
            _ray_dir().rmdir()

    # --- how they are made

    def _netns(self, number: int) -> str:
        return f"dbh{self.net}-{number}"

    def _cable(self, number: int) -> str:
        """This machine's end."""
        return f"dbh{self.net}v{number}"

    def _make(self, names: Sequence[str]) -> None:
        bridge = _bridge(self.net)
        _run("ip", "addr", "add", f"{self.gateway}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for name in ("id", "hostkey"):
            _run(
                "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "ssh" / name)
            )
        for number in range(1, len(names) + 1):
            self._connect(number, bridge)
            self._start(number, names)
        self._write()
        for host in self.hosts.values():
            _wait(lambda host=host: _answers(host.address), f"sshd of {host.name}", READY_S)

    def _connect(self, number: int, bridge: str) -> None:
        netns, cable = self._netns(number), self._cable(number)
        _run("ip", "netns", "add", netns)
        peer = ("type", "veth", "peer", "name", "eth0", "netns", netns)
        _run("ip", "link", "add", cable, *peer)
        _run("ip", "link", "set", cable, "master", bridge, "up")
        within = ("ip", "-n", netns)
        _run(*within, "addr", "add", f"{self._address(number)}/24", "dev", "eth0")
        _run(*within, "link", "set", "lo", "up")
        _run(*within, "link", "set", "eth0", "up")
        # Leads nowhere; Ray and others learn their own address by asking for the way out.
        _run(*within, "route", "add", "default", "via", self.gateway)

    def _address(self, number: int) -> str:
        return f"10.77.{self.net}.{number}"

    def _start(self, number: int, names: Sequence[str]) -> None:
        """Start its first process, in namespaces of its own."""
        folder = self.folder / f"h{number}"
        self._furnish(folder, number, names)
        _ray_dir().mkdir(exist_ok=True)
        with (folder / "sshd.log").open("wb") as log:
            unshared = ("--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc")
            process = subprocess.Popen(
                [
                    *(_tool("ip"), "netns", "exec", self._netns(number)),
                    *(_tool("unshare"), *unshared),
                    *("bash", str(folder / "init.sh"), str(_ray_dir()), _tool("sshd")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at the terminal is not meant for it
            )
        self._started.append(process)
        _wait(
            lambda: _child_of(process.pid) is not None, f"the first process of h{number}", READY_S
        )
        pid = _child_of(process.pid)
        assert pid is not None
        self.hosts[number] = Host(
            number=number,
            name=names[number - 1],
            address=self._address(number),
            pid=pid,
            home=folder / "home",
        )

    def _furnish(self, folder: Path, number: int, names: Sequence[str]) -> None:
        """The files of a host."""
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True)
        (folder / "tmp-ray").mkdir()
        for private in (home, home / ".ssh"):
            private.chmod(0o700)
        public = self.key.with_suffix(".pub").read_text(encoding="utf-8")
        (home / ".ssh" / "authorized_keys").write_text(public, encoding="utf-8")
        env = {"PATH": f"{Path(sys.executable).parent}:$PATH", **self.env}
        lines = "".join(f'export {key}="{value}"\n' for key, value in env.items())
        (home / ".bashrc").write_text(lines, encoding="utf-8")
        (home / ".profile").write_text(". ~/.bashrc\n", encoding="utf-8")
        accounts = Path("/etc/passwd").read_text(encoding="utf-8")
        root = f"root:x:0:0:root:{home}:/bin/bash"
        told = re.sub(r"^root:.*$", root, accounts, count=1, flags=re.MULTILINE)
        (folder / "passwd").write_text(told, encoding="utf-8")
        others = [f"{self._address(n)} {name}" for n, name in enumerate(names, 1)]
        known = "\n".join(["127.0.0.1 localhost", f"{self.gateway} gateway", *others, ""])
        (folder / "hosts").write_text(known, encoding="utf-8")
        (folder / "sshd_config").write_text(
            SSHD_CONFIG.format(address=self._address(number), ssh=self.folder / "ssh"),
            encoding="utf-8",
        )
        (folder / "init.sh").write_text(
            INIT.format(name=names[number - 1], folder=folder, shm=SHM_SIZE), encoding="utf-8"
        )

    def _write(self) -> None:
        told = {
            "net": self.net,
            "env": self.env,
            "hosts": [
                dataclasses.asdict(host) | {"home": str(host.home)} for host in self.hosts.values()
            ],
        }
        (self.folder / "state.json").write_text(json.dumps(told), encoding="utf-8")


SSHD_CONFIG = """\
Port 22
ListenAddress {address}
HostKey {ssh}/hostkey
PidFile none
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
MaxStartups 100
Subsystem sftp internal-sftp
"""

# Each mount is seen by this host alone. HOME is changed by the list of accounts, and not by a mount
# over the real home: the interpreter may lie there.
INIT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/lock
mount -t tmpfs -o size={shm} tmpfs /dev/shm
mount --bind {folder}/tmp-ray "$1"
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/hosts /etc/hosts
export HOME={folder}/home
cd /
exec "$2" -D -e -f {folder}/sshd_config
"""


# --- this machine


def _which(tool: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])
    return shutil.which(tool, path=path)


def _tool(tool: str) -> str:
    found = _which(tool)
    if found is None:
        raise HostsError(f"{tool} is not installed")
    return found


def _path() -> str:
    """The interpreter's own folder first, so that `python` and `ray` are those of this process."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


def _ray_dir() -> Path:
    """Where Ray has its files, on each host."""
    return Path(tempfile.gettempdir()) / "ray"


def _run(*args: str, check: bool = True) -> str:
    done = subprocess.run(
        [_tool(args[0]), *args[1:]], capture_output=True, text=True, check=False, timeout=30
    )
    if check and done.returncode:
        raise HostsError(f"{' '.join(args)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _claim_net() -> int:
    """The first N of 10.77.N.0/24 that is free, with its bridge: whoever makes that has the N.

    Two sets may be made at the same time, and what is half made is taken down by its N.
    """
    taken = set(re.findall(r"inet 10\.77\.(\d+)\.", _run("ip", "-o", "addr")))
    for net in range(256):
        if str(net) in taken or _bridge(net) in _run("ip", "-o", "link"):
            continue
        try:
            _run("ip", "link", "add", _bridge(net), "type", "bridge")
        except HostsError as error:
            if "exists" not in str(error):
                raise
            continue  # another one was quicker
        return net
    raise HostsError("no free network in 10.77.0.0/16")


def _bridge(net: int) -> str:
    return f"dbh{net}br"


def _links_and_namespaces(net: int) -> list[tuple[str, ...]]:
    """What is there of a set, as the commands that delete it. A cable goes with its namespace."""
    spaces = re.findall(rf"^(dbh{net}-\d+)\b", _run("ip", "netns"), re.MULTILINE)
    links = re.findall(rf"^\d+: (dbh{net}(?:br|v\d+))[@:]", _run("ip", "-o", "link"), re.MULTILINE)
    # A cable whose namespace is still being taken apart is deleted by its own name.
    return [("netns", "del", name) for name in spaces] + [("link", "del", name) for name in links]


def _child_of(pid: int) -> int | None:
    """The only child that a process has, if it has one yet."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return int(words[0]) if words else None


def _processes_of(init: int) -> dict[int, str]:
    """Process number -> command line, of all in the pid namespace of a process."""
    try:
        wanted = os.readlink(f"/proc/{init}/ns/pid")
    except OSError:
        return {}
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if os.readlink(entry / "ns/pid") == wanted:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                found[int(entry.name)] = b" ".join(words).decode(errors="replace").strip()
        except OSError:  # it has ended meanwhile
            continue
    return found


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _is_ours(pid: int) -> bool:
    """Is it the first process of a pid namespace: a number that was written down may be another's
    by now."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"^NSpid:\s+\d+\s+(\d+)$", text, re.MULTILINE)
    return found is not None and found.group(1) == "1"


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1.0) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _wait(is_so: Any, what: str, timeout_s: float) -> None:
    """Any: a function of nothing; lambdas of loops have an argument more."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise HostsError(f"{what}: not so after {timeout_s:g} s")
        time.sleep(0.05)


# --- the command line


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--folder",
    type=click.Path(path_type=Path, resolve_path=True),
    default=Path(tempfile.gettempdir()) / "distbelief-hosts",
    show_default=True,
    help="Of this set of hosts.",
)
@click.pass_context
def main(context: click.Context, folder: Path) -> None:
    """Several hosts on this machine, as network namespaces with sshd."""
    context.obj = folder


@main.command("up")
@click.argument("num", type=int)
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Of every login.")
@click.option("--name", "names", multiple=True, help="Of the first, the second, ...; else h1, h2.")
@click.pass_obj
def up_command(folder: Path, num: int, env: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Make NUM hosts."""
    given = dict(one.partition("=")[::2] for one in env)
    _list(Hosts.up(num, folder, given, names))


@main.command("list")
@click.pass_obj
def list_command(folder: Path) -> None:
    """Say where they are and what runs on them."""
    _list(Hosts.find(folder))


@main.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("number", type=int)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def exec_command(folder: Path, number: int, command: tuple[str, ...]) -> None:
    """Run COMMAND on a host."""
    sys.exit(Hosts.find(folder).run(number, *command, check=False).returncode)


@main.command("cut")
@click.argument("number", type=int)
@click.pass_obj
def cut_command(folder: Path, number: int) -> None:
    """Pull a host's cable."""
    Hosts.find(folder).cut(number)


@main.command("heal")
@click.argument("number", type=int)
@click.pass_obj
def heal_command(folder: Path, number: int) -> None:
    """Put it in again."""
    Hosts.find(folder).heal(number)


@main.command("rate")
@click.argument("number", type=int)
@click.argument("mbit", type=click.FloatRange(min=0))
@click.pass_obj
def rate_command(folder: Path, number: int, mbit: float) -> None:
    """Let MBIT megabits a second through, each way."""
    Hosts.find(folder).rate(number, mbit)


@main.command("down")
@click.pass_obj
def down_command(folder: Path) -> None:
    """Take them all away."""
    Hosts.find(folder).down()


def _list(hosts: Hosts) -> None:
    click.echo(f"key {hosts.key}  gateway {hosts.gateway}")
    for number, host in hosts.hosts.items():
        click.echo(f"{host.name}  {host.address}  {len(hosts.processes(number))} processes")
        for pid, text in hosts.processes(number).items():
            click.echo(f"    {pid}  {text[:100]}")


if __name__ == "__main__":
    try:
        main()
    except HostsError as problem:
        click.echo(f"error: {problem}", err=True)
        sys.exit(1)
