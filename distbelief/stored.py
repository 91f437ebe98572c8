"""Stored: the small files of a run in `save.store`, beside the snapshots that shards copy there.

With them the run is resumed where there is nothing else of it. They are copied whenever they have
changed, by a thread that nobody waits for but the end.
"""

import json
import logging
import threading
from pathlib import Path

from distbelief.folder import RunFolder
from distbelief.grants import FILE as GRANTS
from distbelief.job import Job
from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import SnapshotCorrupt, SnapshotFailed
from distbelief.param_server.place import inside
from distbelief.param_server.recovery import recover
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.storage import Storage, storage_of
from distbelief.param_server.url import is_url
from distbelief.problem import Problem

logger = logging.getLogger(__name__)

CONFIG = "config.toml"
FILES = (CONFIG, GRANTS, "checkpoint.json", "result.json")
EVERY_S = 1.0
CLOSE_S = 20.0
"""For the last copies."""


def unusable(store: str, why: str) -> Problem:
    """What is said of a store that cannot be written or read."""
    return Problem(
        "DB-STORE-005",
        f"save.store {store} cannot be used: {why}",
        why="snapshots are kept there, for when a host is lost",
        fix="see that this host reaches it and may write there, or leave save.store out",
    )


class Copies:
    """Keeps the small files of a run folder in its store. Used by one thread."""

    def __init__(self, storage: Storage, folder: Path, every_s: float = EVERY_S) -> None:
        """The files are there when this returns. Raises: OSError."""
        self._storage = storage
        self._folder = folder
        self._every_s = every_s
        self._seen: dict[str, tuple[int, int] | None] = {}
        self._is_failing = False
        self._ending = threading.Event()
        storage.begin()
        self._copy_changed()
        self._thread = threading.Thread(target=self._run, name="stored")
        self._thread.start()

    def close(self) -> None:
        """Copy once more what has changed, and end."""
        self._ending.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ending.wait(self._every_s)
            try:
                self._copy_changed()
            except OSError as error:
                if not self._is_failing:
                    logger.error("%s cannot be written: %s", self._storage.root, error)
                self._is_failing = True
            else:
                self._is_failing = False

    def _copy_changed(self) -> None:
        for name in FILES:
            mark = _mark_of(self._folder / name)
            if name in self._seen and self._seen[name] == mark:
                continue
            if mark is None:
                self._storage.remove(name)
            else:
                self._storage.write(name, (self._folder / name).read_bytes())
            self._seen[name] = mark


def keep_copies(job: Job, folder: RunFolder) -> Copies | None:
    """Begin to keep a run's small files in its store, if it has one. Raises: Problem."""
    if not job.save.store:
        return None
    try:
        return Copies(storage_of(job.save.store, folder.run), folder.path)
    except (OSError, ValueError) as error:
        raise unusable(job.save.store, str(error)) from error


def is_stored(run: str) -> bool:
    """Whether an argument names a run in a store: a URL, or a run's folder without logs."""
    path = Path(run)
    return is_url(run) or ((path / CONFIG).is_file() and not (path / "logs").is_dir())


def fetch(run: str, run_dir: Path) -> RunFolder:
    """Make the folder of a run that is in a store: its small files and newest snapshots.

    run: a URL or a path. Raises: Problem.
    """
    place, _, name = run.rstrip("/").rpartition("/")
    try:
        storage = storage_of(place or str(Path.cwd()), name)
        job = Job.from_toml(storage.read(CONFIG).decode())
        there = storage.names("")
        inside(run_dir, name)  # a run's id is a name of ours
    except (OSError, ValueError) as error:
        raise Problem(
            "DB-RUN-002", f"{run} is no run in a store: {error}", fix="name the folder of one run"
        ) from error
    folder = RunFolder.make(run_dir, name)
    try:
        granted: dict[str, int] = {}
        for file in sorted(set(FILES).intersection(there)):
            (folder.path / file).write_bytes(storage.read(file))
        if GRANTS in there:
            granted = json.loads((folder.path / GRANTS).read_text(encoding="utf-8"))
        for index in range(job.shards):
            _fetch_shard(storage, folder, f"shard{index}", granted)
        folder.write(GRANTS, granted)
    except (OSError, ValueError, SnapshotFailed) as error:
        raise unusable(place, str(error)) from error
    except SnapshotCorrupt as error:
        raise Problem("DB-STORE-003", str(error)) from error
    return folder


def _fetch_shard(storage: Storage, folder: RunFolder, name: str, granted: dict[str, int]) -> None:
    """Fetch a shard's newest snapshot, and see that no number is granted twice.

    The copy of what was granted may be a little older than what has been there since.
    """
    depot = Depot(storage, name, 0)
    found = recover(SnapshotStore(folder.snapshots / name), depot)
    granted[name] = max(granted.get(name, 0), depot.latest_epoch())
    incarnations = {} if found is None else found.image.incarnations
    for w, inc in incarnations.items():
        granted[w] = max(granted.get(w, 0), inc)


def _mark_of(path: Path) -> tuple[int, int] | None:
    """What is another one when the file has changed: it is replaced whole. None: it is not there"""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
