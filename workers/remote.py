"""Remote: files of any fsspec URL (s3://, gs://, https:// ...), copied once to this machine.

Samples are read at any place of a shard, in another order in each epoch: over a network each would
be a request. A copy is kept under what the store says of the file's content (fsspec's `ukey`), so a
file that was changed there is fetched again. Several processes of a machine fetch a file once.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from distbelief.param_server.url import file_system_of, told

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where copies are kept; nobody but their users removes them."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "distbelief" / "data"


def names_of(url: str) -> list[str]:
    """The URLs of a pattern with * ? [...], in sorted order; the URL itself without such.

    Raises: FileNotFoundError where nothing matches; OSError where the store cannot be asked;
    ValueError for a protocol that needs a package that is not here.
    """
    with told(url):
        return _names_of(url)


def _names_of(url: str) -> list[str]:
    store, path = file_system_of(url)
    if not any(mark in path for mark in "*?["):
        store.info(path)  # whether it is there
        return [url]
    found = sorted(store.glob(path))
    if not found:
        raise FileNotFoundError("no file matches")
    return [str(store.unstrip_protocol(name)) for name in found]


def copies_of(urls: Sequence[str]) -> list[str]:
    """Copies of files on this machine, made now where there are none. Raises: as `names_of`."""
    return [str(copy_of(url)) for url in urls]


def copy_of(url: str) -> Path:
    """A file's copy on this machine, under its own name. Raises: as `names_of`."""
    with told(url):
        return _copy_of(url)


def _copy_of(url: str) -> Path:
    store, path = file_system_of(url)
    info = store.info(path)
    content = (url, store.ukey(path), info.get("size"), info.get("ETag"))
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:24]
    folder = cache_folder() / key
    copy = folder / Path(path).name
    if copy.is_file():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / ".lock"):
        if not copy.is_file():  # else another process has copied it meanwhile
            size = info.get("size") or 0
            free = shutil.disk_usage(folder).free
            if size > free:
                raise OSError(f"{url} has {size:,} bytes, {folder} {free:,} bytes free")
            logger.info("copying %s, %d bytes, to %s", url, size, copy)
            part = copy.with_name(f".{copy.name}.part")
            store.get_file(path, str(part))
            if size and part.stat().st_size != size:
                raise OSError(f"{url} has {size:,} bytes, {part.stat().st_size:,} came")
            part.replace(copy)
    return copy


def beside(url: str, name: str) -> Path | None:
    """The copy of a file in a URL's folder; None where there is no such file."""
    other = f"{url.rpartition('/')[0]}/{name}"
    try:
        return copy_of(other)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
