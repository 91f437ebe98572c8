"""Stores as fsspec knows them, in memory, with the worse habits that real ones have."""

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """As S3 and its like: no rename, and a listing that is remembered until that is undone.

    `failing` is raised by whatever writes; `torn` makes it write half of that before.
    """

    protocol = "objects"
    store: dict[str, Any] = {}  # noqa: RUF012 - one for all instances, as in the class above
    pseudo_dirs = [""]  # noqa: RUF012
    failing: Exception | None = None
    torn = False
    remembered: dict[Any, Any] = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("objects://", "memory://"))

    def ls(self, path, detail=True, **kwargs):
        if (path, detail) not in self.remembered:
            self.remembered[path, detail] = super().ls(path, detail=detail, **kwargs)
        return self.remembered[path, detail]

    def invalidate_cache(self, path=None):
        self.remembered.clear()

    def pipe_file(self, path, value, **kwargs):
        self._fail(path, value)
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, "rb") as file:
            self._fail(rpath, file.read())
        super().put_file(lpath, rpath, **kwargs)

    def mv(self, *args, **kwargs):
        raise NotImplementedError("an object store has no rename")

    rename = move = mv_file = mv

    def _fail(self, path, value):
        if self.failing is not None:
            if self.torn:
                super().pipe_file(path, value[: len(value) // 2])
            raise self.failing

    @classmethod
    def empty(cls):
        cls.store.clear()
        cls.remembered.clear()
        cls.pseudo_dirs[:] = [""]
        cls.failing, cls.torn = None, False


fsspec.register_implementation("objects", ObjectStore, clobber=True)
