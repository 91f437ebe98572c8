"""Shards of other stores: a store in memory, and real HTTP on the loopback."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from PIL import Image

from distbelief.param_server.url import is_url
from distbelief.workers.remote import beside, cache_folder, copy_of, names_of
from distbelief.workers.tars import open_tars


def shard(*targets: int) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, target in enumerate(targets):
            picture = BytesIO()
            Image.new("RGB", (8, 8), (target, target, target)).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("cls", str(target).encode())):
                info = tarfile.TarInfo(f"s{number}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    return out.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distbelief" / "data"


@pytest.fixture
def store():
    """A store in memory, empty at the beginning and the end."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def test_shards_of_a_store_are_read_like_those_of_a_disk(store, cache):
    store.pipe("/set/train-0.tar", shard(0, 1))
    store.pipe("/set/train-1.tar", shard(2))
    store.pipe("/set/test-0.tar", shard(1))
    store.pipe("/set/classes.json", json.dumps(["a", "b", "c", "d"]).encode())
    for pattern in ("memory://set/{split}-*.tar", "memory://set/{split}-{0..0}.tar"):
        test = open_tars(pattern, "test", 0)
        assert test is not None
        assert (len(test), test.num_classes, test.input_shape) == (1, 4, (3, 8, 8))
    train = open_tars("memory://set/{split}-*.tar", "train", 0)
    assert train is not None
    read = train.samples.read([2, 0, 1])
    assert (read.targets.tolist(), read.inputs[:, 0, 0, 0].tolist()) == ([2, 0, 1], [2, 0, 1])
    train.samples.close()
    assert cache_folder() == cache


def test_the_digest_does_not_depend_on_where_the_copies_are(store, monkeypatch, tmp_path):
    store.pipe("/set/a.tar", shard(0, 1))
    first = open_tars("memory://set/a.tar", "train", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    second = open_tars("memory://set/a.tar", "train", 4)
    (tmp_path / "a.tar").write_bytes(shard(0, 1))
    third = open_tars(str(tmp_path / "a.tar"), "train", 4)
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.digest == second.digest == third.digest


def test_a_file_is_copied_once_and_again_when_it_was_changed(store, monkeypatch):
    fetched = []
    real = type(store).get_file

    def get_file(self, path, target, **more):
        fetched.append(path)
        real(self, path, target, **more)

    monkeypatch.setattr(type(store), "get_file", get_file)
    store.pipe("/a.tar", shard(0))
    first = copy_of("memory://a.tar")
    assert copy_of("memory://a.tar") == first
    assert fetched == ["/a.tar"]
    assert first.read_bytes() == shard(0)
    store.pipe("/a.tar", shard(0, 1))
    assert copy_of("memory://a.tar").read_bytes() == shard(0, 1)


def test_a_copy_that_was_cut_off_is_no_copy(store, monkeypatch):
    store.pipe("/a.tar", shard(0))

    def half(self, path, target, **_):
        Path(target).write_bytes(shard(0)[:10])

    def cut(self, path, target, **_):
        half(self, path, target)
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", cut)
        with pytest.raises(ConnectionResetError):
            copy_of("memory://a.tar")
        patch.setattr(type(store), "get_file", half)
        with pytest.raises(OSError, match=r"10 came"):
            copy_of("memory://a.tar")
    assert copy_of("memory://a.tar").read_bytes() == shard(0)


def test_what_is_not_there_is_told(store):
    for url in ("memory://none.tar", "memory://none-*.tar"):
        with pytest.raises(FileNotFoundError, match="none"):
            names_of(url)
    with pytest.raises(FileNotFoundError):
        open_tars("memory://set/{split}-*.tar", "train", 4)
    assert beside("memory://set/a.tar", "classes.json") is None
    with pytest.raises(ValueError, match="nosuch://a"):
        names_of("nosuch://a.tar")


def test_errors_of_a_stores_own_package_are_oserrors(store, monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def refuse(self, path, **_):
        raise NoCredentialsError("unable to locate credentials")

    monkeypatch.setattr(type(store), "info", refuse)
    with pytest.raises(OSError, match="NoCredentialsError: unable to locate"):
        copy_of("memory://a.tar")


def test_a_full_disk_is_told_before_anything_is_copied(store, monkeypatch):
    store.pipe("/a.tar", shard(0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(OSError, match="100 bytes free"):
        copy_of("memory://a.tar")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("s3://b/a.tar", True), ("https://h/a.tar", True), ("/data/a.tar", False), ("a.tar", False)],
)
def test_a_url_is_told_from_a_path(path, expected):
    assert is_url(path) is expected


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.integration
def test_processes_of_a_machine_read_over_http_and_fetch_a_shard_once(tmp_path):
    """In processes of their own: fsspec's HTTP keeps a thread."""
    served = tmp_path / "served"
    served.mkdir()
    for name in ("train-000", "train-001", "test-000"):
        (served / f"{name}.tar").write_bytes(shard(0, 1, 2))
    Quiet.asked.clear()
    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/{{split}}-{{000..001}}.tar"
            program = (
                "import sys; from distbelief.workers.tars import open_tars; "
                "print(len(open_tars(sys.argv[1], 'train', 0)))"
            )
            command = [sys.executable, "-c", program, url]
            running = [
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)
            ]
            assert [process.communicate()[0].strip() for process in running] == ["6"] * 3
        finally:
            server.shutdown()
            thread.join()
    tars = [path for path in Quiet.asked if path.endswith(".tar")]
    assert sorted(tars) == ["/train-000.tar", "/train-001.tar"]
