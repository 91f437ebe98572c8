"""Keyring: the keys of a run, and the files that keys are kept in.

    DIR/NAME.secret     the secret key, 40 characters of Z85; for its owner alone to read (0600)
    DIR/NAME.public     the public key, which is nobody's secret

All servers of a run, its shards, its controller and its monitor, share the pair `server`: so a
worker knows them by one key, and has no secret of theirs. Every process has a pair of its own
beside it, by which the servers know its name. Pairs are made for each start of a run, and end with
it; those that lie in `net.keys` are used instead.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distbelief.param_server.curve import Keys, Pair, missing
from distbelief.param_server.place import NAME
from distbelief.problem import Problem

if TYPE_CHECKING:
    from distbelief.job import Job

SERVER = "server"
LAUNCHER = "launcher"
"""The launcher's own name where it asks the shards for what they have."""
MONITOR = "monitor"
"""It takes reports of workers and shards, and speaks to nobody."""
EVALUATOR = "evaluator"
"""It fetches as workers do."""


class Keyring:
    """See the top of this file. Used by the launcher."""

    def __init__(
        self, workers: Sequence[str], shards: Sequence[str], folder: Path | None = None
    ) -> None:
        """workers, shards: names of all that may take part. folder: pairs to use, by their names.

        Raises: Problem for a file there that is no key, or that others may read.
        """

        def pair(name: str) -> Pair:
            if folder is not None and secret_file(folder, name).exists():
                return read_pair(folder, name)
            return Pair.new()

        if folder is not None and not secret_file(folder, SERVER).exists():
            raise Problem(
                "DB-KEY-002",
                f"{secret_file(folder, SERVER)} is not there",
                why="net.keys names a folder with the key of the run's servers",
                fix=f"distbelief keys new {folder}",
            )
        self._server = pair(SERVER)
        self._pairs = {name: pair(name) for name in (*workers, *shards, LAUNCHER, MONITOR)}
        self._workers = set(workers)
        self._shards = set(shards)

    @property
    def listed(self) -> dict[str, str]:
        """Public keys by name, the servers' first."""
        return {SERVER: self._server.public, **{n: p.public for n, p in self._pairs.items()}}

    def of(self, name: str) -> Keys:
        """What a worker, a shard or the launcher is told. Workers get no secret of a server."""
        mine, server = self._pairs[name], self._server.public
        if name in self._workers:
            return Keys(mine=mine, server=server)
        others = self._shards if name in (LAUNCHER, MONITOR) else {LAUNCHER}
        names = {self._pairs[n].public: n for n in sorted(self._workers | others)}
        return Keys(mine=mine, server=server, serving=self._server.secret, names=names)


def secret_file(folder: Path, name: str) -> Path:
    """Raises: Problem for a name that could lead elsewhere."""
    if not NAME.fullmatch(name):
        raise Problem("DB-KEY-002", f"{name!r} is no name of a key", fix=f"write {NAME.pattern}")
    return folder / f"{name}.secret"


def write_pair(folder: Path, name: str) -> Pair:
    """Make a pair and write it down; the folder is made where it is not there.

    Raises: Problem if there is a key of that name already, or the files cannot be written.
    """
    secret = secret_file(folder, name)
    pair = Pair.new()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Never through what somebody has put there before: O_EXCL follows no link either.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        for path, mode, text in (
            (secret, 0o600, pair.secret.encode()),
            (secret.with_suffix(".public"), 0o644, pair.public.encode()),
        ):
            descriptor = os.open(path, flags, mode)
            with open(descriptor, "wb") as file:
                file.write(text + b"\n")
    except FileExistsError as error:
        raise Problem(
            "DB-KEY-001",
            f"{error.filename} is there already, and a key is never written over",
            fix="name another folder, or remove it if nobody uses it any more",
        ) from error
    except OSError as error:
        raise Problem("DB-KEY-002", f"{folder} cannot be written: {error.strerror}") from error
    return pair


def read_pair(folder: Path, name: str) -> Pair:
    """Raises: Problem for what is no key, or where others than its owner may read it."""
    path = secret_file(folder, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            text = file.read(200)
    except OSError as error:
        raise Problem("DB-KEY-002", f"{path} cannot be read: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise Problem(
            "DB-KEY-002",
            f"{path} may be read by others: its mode is {stat.S_IMODE(mode):04o}",
            why="who has read it can be a server of your runs",
            fix=f"chmod 600 {path}; if somebody may have read it, make a new key",
        )
    try:
        return Pair.of(text.decode("ascii", "replace").strip())
    except ValueError as error:
        raise Problem("DB-KEY-002", f"{path}: {error}") from error


def keyring_of(job: "Job") -> Keyring | None:
    """Keys for all that may take part; None where nothing is encrypted. Raises: Problem."""
    if not job.net.is_encrypted:
        return None
    lacking = missing()
    if lacking:
        raise Problem("DB-ENV-004", lacking, fix="pip install -U pyzmq, or use net.host 127.0.0.1")
    workers = [f"w{index}" for index in range(job.workers)]
    workers += [EVALUATOR] if job.evaluate.every_s else []
    shards = [f"shard{index}" for index in range(job.shards)]
    folder = Path(job.net.keys).expanduser() if job.net.keys else None
    return Keyring(workers, shards, folder)
