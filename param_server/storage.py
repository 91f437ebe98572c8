"""Storage: files of a run where other hosts find them: in a folder they share, or behind a URL.

The one promise asked of a URL is that what was written is read, and listed, from then on: S3, GCS,
Azure's store and every disk keep it. No rename is asked for, and no compare-and-swap.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from distbelief.param_server.url import file_system_of, is_url, told


class Storage(Protocol):
    """Names are paths below one folder, with `/`. All methods raise OSError."""

    root: str
    """For people."""

    def begin(self) -> None:
        """See that there is a place for the run, before any other process looks for it."""

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder; none where there is no such folder."""

    def make(self, folder: str) -> None:
        """See that files can be put into a folder."""

    def write(self, name: str, data: bytes) -> None: ...

    def put(self, name: str, source: Path) -> None:
        """Copy a file of this machine there."""

    def read(self, name: str) -> bytes: ...

    def get(self, name: str, target: Path) -> None:
        """Copy a file from there to this machine."""

    def remove(self, name: str) -> None:
        """It may be gone already."""


def storage_of(place: str, run: str) -> Storage:
    """The files of a run in a store: an absolute path, or a URL.

    Raises: OSError, ValueError for a protocol that needs a package that is not here.
    """
    if place.startswith("file://"):
        place = place.removeprefix("file://")
    if is_url(place):
        return UrlStorage(f"{place.rstrip('/')}/{run}")
    return FolderStorage(Path(place) / run)


class FolderStorage:
    """A folder that several hosts have mounted. Files are there whole and synced, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self._folder = folder

    def begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in (self._folder / folder).iterdir())
        except FileNotFoundError:
            # The disk may not be mounted any more, and then nothing is known.
            self._folder.stat()
            return []

    def make(self, folder: str) -> None:
        """Below the run's own folder, which must be there: else this is not the shared disk."""
        place = self._folder / folder
        place.mkdir(exist_ok=True)
        for abandoned in place.glob(".*.part"):  # by a host that was lost
            abandoned.unlink(missing_ok=True)
        _sync(self._folder)

    def write(self, name: str, data: bytes) -> None:
        self._replace(name, lambda path: path.write_bytes(data))

    def put(self, name: str, source: Path) -> None:
        self._replace(name, lambda path: shutil.copyfile(source, path))

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def get(self, name: str, target: Path) -> None:
        shutil.copyfile(self._folder / name, target)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def _replace(self, name: str, fill: Callable[[Path], object]) -> None:
        path = self._folder / name
        part = path.with_name(f".{path.name}.part")
        try:
            fill(part)
            _sync(part)
            part.replace(path)
            _sync(path.parent)
        except OSError:
            part.unlink(missing_ok=True)
            raise


class UrlStorage:
    """Behind a URL, by fsspec. Some stores show a file while it is written."""

    def __init__(self, url: str) -> None:
        """Raises: as `storage_of`."""
        self.root = url
        with told(url):
            self._system, self._path = file_system_of(url)

    def begin(self) -> None:
        """Nothing, as `make`."""

    def names(self, folder: str) -> list[str]:
        with _told(self.root):
            self._system.invalidate_cache()  # others write there too
            try:
                found = self._system.ls(self._of(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def make(self, folder: str) -> None:
        """Nothing: `put` makes folders where there are such."""

    def write(self, name: str, data: bytes) -> None:
        with _told(self.root):
            self._in_folder(name, lambda: self._system.pipe_file(self._of(name), data))

    def put(self, name: str, source: Path) -> None:
        with _told(self.root):
            self._in_folder(name, lambda: self._system.put_file(str(source), self._of(name)))

    def read(self, name: str) -> bytes:
        with _told(self.root):
            data: bytes = self._system.cat_file(self._of(name))
            return data

    def get(self, name: str, target: Path) -> None:
        with _told(self.root):
            self._system.get_file(self._of(name), str(target))

    def remove(self, name: str) -> None:
        with _told(self.root):
            try:
                self._system.rm_file(self._of(name))
            except FileNotFoundError:
                return

    def _of(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _in_folder(self, name: str, do: Callable[[], object]) -> None:
        """Where there are folders, they are made; never a bucket, which is somebody's to pay."""
        try:
            do()
        except FileNotFoundError:
            top = self._path.lstrip("/").partition("/")[0]
            if not self._system.exists(self._path[: self._path.index(top)] + top):
                raise
            self._system.makedirs(self._of(name).rpartition("/")[0], exist_ok=True)
            do()


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """As `told`, where a ValueError is the store's as well."""
    try:
        with told(url):
            yield
    except ValueError as error:
        raise OSError(str(error)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
