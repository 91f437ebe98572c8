"""Tars: samples in WebDataset shards, plain tar files read at any place.

    member  = KEY "." EXTENSION      KEY ends at the first dot of the base name
    sample  = members of one KEY, one after the other: one image and one .cls
    .cls    = the class, an ASCII number from 0

Other members (.json, .txt ...) are not looked at; nothing is unpickled. A tar is gone through
once, header by header, about 5 us for each; after that a sample is one `pread`. tarfile takes
four times as long, and ends at a damaged header without a word.
"""

import glob
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand

from distbelief.param_server.url import is_url
from distbelief.workers.pixels import EXTENSIONS, MAX_BYTES, BadSample, Pictures, size_of
from distbelief.workers.remote import beside, copies_of, names_of
from distbelief.workers.split import Names, Split, digest_of

MAX_OPEN = 64
"""Tars held open by one process."""

_BLOCK = 512
_END = bytes(_BLOCK)
_PACKED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_MAX_NAME = 2**20
"""Bytes of a long name or of a pax header."""
_MAX_KEY = 4096
"""Characters of a sample's name: it is kept in memory."""
MAX_SAMPLES = 10_000_000
"""In one tar; its index would have more than a gigabyte."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Where its content begins."""
    size: int
    head: bytes
    """The first bytes of its content, at most 512: they come with the header."""


@dataclass(frozen=True, slots=True)
class Index:
    """The samples of one tar, in its order."""

    path: str
    keys: Names
    offsets: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    """Of the images."""
    sizes: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    classes: "np.ndarray[tuple[int], np.dtype[np.int64]]"

    @property
    def digest(self) -> str:
        arrays = (self.offsets, self.sizes, self.classes)
        return digest_of(bytes(self.keys), *(array.tobytes() for array in arrays))


class TarFiles:
    """The images of some tars, one tar after the other."""

    def __init__(self, tars: Sequence[Index]) -> None:
        self._tars = tars
        self._starts = np.cumsum([0, *(len(tar.keys) for tar in tars)])
        self._open: dict[int, int] = {}
        """Tar -> file descriptor, the one that was used last at the end."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        number, within = self._find(index)
        return f"{self._tars[number].path}: {self._tars[number].keys[within]}"

    def load(self, index: int) -> bytes:
        number, within = self._find(index)
        tar = self._tars[number]
        size = int(tar.sizes[within])
        try:
            data = os.pread(self._descriptor(number), size, int(tar.offsets[within]))
        except OSError as error:
            raise BadSample(self.name(index), error.strerror or str(error)) from error
        if len(data) < size:
            raise BadSample(self.name(index), "the tar has become shorter since the start")
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _find(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return number, index - int(self._starts[number])

    def _descriptor(self, number: int) -> int:
        # A descriptor that came through a fork may be used too: pread has no position to share.
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self._tars[number].path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[number] = descriptor
        return descriptor


def open_tars(pattern: str, split: str, image_size: int) -> Split | None:
    """A split of WebDataset shards; None if the pattern names no test split.

    pattern: a path, or a URL that fsspec knows, with * ? [...] and ranges such as {000..009}. What
        a URL names is copied to this machine first (remote.py). `{split}` in it stands for the
        split's name (val where there is no test); without it all shards are the training split.
    image_size: 0 takes the shorter side of the training split's first image, at most 224.
    Raises: FileNotFoundError or ValueError naming the tar and what is wrong in it.
    """
    if pattern.startswith("pipe:"):
        raise ValueError(f"{pattern}: commands are not run; name files, or a URL such as s3://")
    if "{split}" not in pattern:
        if split == "test":
            return None
        train = shards = _expand(pattern, pattern)
    else:
        shards = _test_shards(pattern) if split == "test" else _of(pattern, split)
        train = shards if split == "train" else []
    listed: Path | None = Path(shards[0]).parent / "classes.json"
    if is_url(shards[0]):
        listed = beside(shards[0], "classes.json")
    names = None if listed is None else _listed_classes(listed)
    num_classes = None if names is None else len(names)
    tars = _indices(shards)
    files = TarFiles(tars)
    classes = np.concatenate([tar.classes for tar in tars])
    first = files
    if split == "test" and not (image_size and num_classes):
        # What the model needs to know of the data is a matter of the training split.
        train = _of(pattern, "train")
        first = TarFiles(_indices(train))
    if not num_classes:
        num_classes = 1 + max(int(tar.classes.max()) for tar in _indices(train))
    if int(classes.max()) >= num_classes:
        at = int(classes.argmax())
        raise ValueError(
            f"{files.name(at)} is of class {classes[at]}, but there are {num_classes} classes: "
            "see classes.json beside the shards, or the training split"
        )
    if not image_size:
        image_size = size_of(first)
        first.close()
    return Split(
        samples=Pictures(files, classes, image_size),
        name=split,
        num_classes=num_classes,
        input_shape=(3, image_size, image_size),
        class_names=names,
        digest=digest_of(*(os.fsencode(Path(tar.path).name) + tar.digest.encode() for tar in tars)),
        is_decoding=True,
    )


def _indices(shards: Sequence[str]) -> list[Index]:
    return [index_of(path) for path in (copies_of(shards) if is_url(shards[0]) else shards)]


def index_of(path: str) -> Index:
    """Find the samples of a tar; a tar that did not change is gone through once in a process.

    Raises: OSError; ValueError naming the tar and the sample, or where in the tar it is damaged.
    """
    status = os.stat(path)
    return _index_of(path, status.st_size, status.st_mtime_ns)


@cache
def _index_of(path: str, size: int, _: int) -> Index:
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    classes: list[int] = []
    image: Member | None = None
    number: int | None = None
    current: str | None = None

    def finish() -> None:
        if current is None:
            return
        if image is None:
            raise ValueError(f"{path}: sample {current} has no image (.{', .'.join(_IMAGES)})")
        if number is None:
            raise ValueError(f"{path}: sample {current} has no .cls with its class")
        if len(keys) == MAX_SAMPLES:
            raise ValueError(f"{path} holds more than {MAX_SAMPLES:,} samples: cut it into several")
        keys.append(current)
        offsets.append(image.offset)
        sizes.append(image.size)
        classes.append(number)

    for member in members(path, size):
        key, extension = _key(member.name)
        if key is None:
            continue
        if len(key) > _MAX_KEY:
            raise ValueError(f"{path}: a sample has a name of {len(key)} characters: {key[:40]}...")
        if key != current:
            finish()
            image, number, current = None, None, key
        if extension == "cls":
            if number is not None:
                raise ValueError(f"{path}: sample {key} has two .cls")
            number = _class(path, member)
        elif extension in EXTENSIONS:
            if image is not None:
                raise ValueError(f"{path}: sample {key} has two images")
            if member.size > MAX_BYTES:
                raise ValueError(f"{path}: {member.name} is larger than {MAX_BYTES // 2**20} MiB")
            image = member
    finish()
    if not keys:
        raise ValueError(f"{path} holds no samples")
    return Index(path, Names(keys), np.array(offsets), np.array(sizes), np.array(classes))


_IMAGES = sorted(EXTENSIONS)


def _key(name: str) -> tuple[str | None, str]:
    """Key and extension of a member; no key for names that begin with a dot or have none."""
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    if dot <= start:
        return None, ""
    return name[:dot], name[dot + 1 :].lower()


def _class(path: str, member: Member) -> int:
    text = member.head[: member.size].strip()
    if member.size > _BLOCK or not text.isdigit() or len(text) > 9:
        raise ValueError(
            f"{path}: {member.name} holds {text[:40]!r}, not a class: a whole number from 0"
        )
    return int(text)


def members(path: str, size: int) -> Iterator[Member]:
    """The regular files of a tar: ustar, GNU and pax names. size: of the tar in bytes.

    Raises: OSError; ValueError naming the place of what is damaged.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _Scan(path, descriptor, size)
    finally:
        os.close(descriptor)


class _Scan:
    """One pass over the headers of a tar."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size

    def __iter__(self) -> Iterator[Member]:
        offset = 0
        name: str | None = None
        length: int | None = None
        while True:
            block = os.pread(self._descriptor, 2 * _BLOCK, offset)
            header = block[:_BLOCK]
            if header == _END:
                return
            self._check(header, offset)
            size = self._number(header[124:136], offset)
            kind = header[156:157]
            start = offset + _BLOCK
            if kind in b"123456":  # links, devices, folders: a size would not be of any content
                offset, name, length = start, None, None
                continue
            if kind == b"L":
                name = self._text(start, size, offset).rstrip(b"\0").decode(*_UTF8)
            elif kind == b"x":
                records = self._pax(self._text(start, size, offset), offset)
                name = records.get("path", name)
                length = self._length(records, offset)
            elif kind in b"\x0007":
                size = size if length is None else length
                name = name if name is not None else _name(header)
                if start + size > self._size:
                    raise self._cut(f"{name} at byte {offset} ends", start + size)
                if not name.endswith("/"):  # an old way to write a folder
                    yield Member(name, start, size, block[_BLOCK : _BLOCK + size])
                name = length = None
            elif kind == b"S":
                raise ValueError(f"{self._path}: {_name(header)} at byte {offset} is sparse")
            elif kind not in b"gK":
                name = length = None
            offset = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK

    def _check(self, header: bytes, offset: int) -> None:
        if len(header) < _BLOCK:
            for magic, command in _PACKED.items():
                if offset == 0 and header.startswith(magic):
                    raise self._packed(command)
            raise self._cut("its end mark is missing", offset)
        # The sum of all bytes, the field itself counted as spaces. Adler-32's lower half is that
        # sum plus 1, modulo 65521, a hundred times as fast as a sum in Python.
        total = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
        try:
            stated = int(header[148:156].strip(b" \0") or b"x", 8)
        except ValueError:
            stated = -1
        if stated < 0 or (stated + 1) % 65521 != total:
            for magic, command in _PACKED.items():
                if offset == 0 and header.startswith(magic):
                    raise self._packed(command)
            raise ValueError(f"{self._path} is damaged at byte {offset}: not a tar header")

    def _number(self, field: bytes, offset: int) -> int:
        """Octal digits, or, above 8 GiB, a big-endian number marked by its first bit."""
        try:
            if field[0] & 0x80:
                number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
            else:
                number = int(field.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            number = -1
        if number < 0:
            raise ValueError(f"{self._path} is damaged at byte {offset}: a size of {field!r}")
        return number

    def _text(self, start: int, size: int, offset: int) -> bytes:
        if size > _MAX_NAME:
            raise ValueError(f"{self._path} is damaged at byte {offset}: a name of {size} bytes")
        text = os.pread(self._descriptor, size, start)
        if len(text) < size:
            raise self._cut(f"a name at byte {offset} ends", start + size)
        return text

    def _pax(self, text: bytes, offset: int) -> dict[str, str]:
        """Records `length key=value newline`, where the length is of the whole record."""
        records: dict[str, str] = {}
        while text.strip(b"\0"):
            digits, space, _ = text.partition(b" ")
            length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
            key, equals, value = text[len(digits) + 1 : length].partition(b"=")
            if not equals or length > len(text) or not value.endswith(b"\n"):
                raise ValueError(f"{self._path} is damaged at byte {offset}: a pax header")
            records[key.decode(*_UTF8)] = value[:-1].decode(*_UTF8)
            text = text[length:]
        if any(key.startswith("GNU.sparse") for key in records):
            raise ValueError(f"{self._path}: a member at byte {offset} is sparse")
        return records

    def _length(self, records: dict[str, str], offset: int) -> int | None:
        text = records.get("size")
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise ValueError(f"{self._path} is damaged at byte {offset}: a size of {text!r}")
        return int(text)

    def _cut(self, what: str, offset: int) -> ValueError:
        return ValueError(
            f"{self._path} is cut short: {what}{f' at byte {offset}' if offset else ''}, the file "
            f"has {self._size}. Copy or write it again"
        )

    def _packed(self, command: str) -> ValueError:
        return ValueError(
            f"{self._path} is compressed: shards are read at any place, so unpack it first "
            f"({command} {self._path}); images are compressed as they are"
        )


_UTF8 = ("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # GNU's old form has other things where POSIX has the beginning of a long path.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(*_UTF8)


def _of(pattern: str, split: str) -> list[str]:
    return _expand(pattern.replace("{split}", split), pattern)


def _test_shards(pattern: str) -> list[str]:
    """Those called test, or else val. The pattern says that there are some."""
    try:
        return _of(pattern, "test")
    except FileNotFoundError as error:
        try:
            return _of(pattern, "val")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{error}; nor are there any called val. If there is no test split, write train "
                "for {split} in the pattern"
            ) from None


def _expand(pattern: str, source: str) -> list[str]:
    """The files of a pattern in sorted order. source: as the user wrote it, for the error."""
    try:
        pieces = list(braceexpand(os.path.expanduser(pattern)))
    except ValueError as error:  # unbalanced braces
        raise ValueError(f"wds:{source}: {error}") from error
    found: list[str] = []
    for piece in pieces:
        if is_url(piece):
            found += names_of(piece)
            continue
        names = [piece] if Path(piece).is_file() else sorted(glob.glob(piece, recursive=True))
        if not names:
            raise FileNotFoundError(
                f"{piece} matches no file: the shards of wds:{source} must be there under this "
                "path on every machine with a worker"
            )
        found += names
    for name in found:
        is_file = is_url(name) or Path(name).is_file()
        if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")) or not is_file:
            raise ValueError(
                f"{name} is no plain tar file: unpack it first; shards are read at any place"
            )
    return found


def _listed_classes(path: Path) -> list[str] | None:
    """The classes that a classes.json names; None where there is none."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path} must be a list with a name for each class")
    return [str(name) for name in names]
