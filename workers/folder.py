"""Folder: images in folders named after their classes, as torchvision's ImageFolder has them.

PATH/CLASS/**/IMAGE. If PATH/train holds folders, the splits are PATH/train and PATH/test (or
PATH/val); otherwise PATH itself is the training split and there is no test split. Classes are
numbered in the sorted order of their names. Hidden files, and files that are no images by their
names, are not looked at.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from distbelief.workers.pixels import EXTENSIONS, MAX_BYTES, SIZE_FROM, BadSample, Pictures, size_of
from distbelief.workers.split import Names, Split, digest_of


class FolderFiles:
    """Files below a folder, by their relative names. Nothing stays open between two reads."""

    def __init__(self, root: Path, names: Names) -> None:
        self._root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._root / self._names[index])

    def load(self, index: int) -> bytes:
        name = self.name(index)
        try:
            # Not waiting: a pipe would be opened when somebody writes to it, and so perhaps never.
            with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadSample(name, "not a file")
                if status.st_size > MAX_BYTES:
                    raise BadSample(name, f"larger than {MAX_BYTES // 2**20} MiB")
                return file.read(MAX_BYTES)  # it may grow meanwhile
        except OSError as error:
            raise BadSample(name, error.strerror or str(error)) from error

    def close(self) -> None:
        """Nothing is open."""


def open_folder(path: Path, split: str, image_size: int) -> Split | None:
    """A split of a folder; None if that has no test split.

    image_size: 0 takes the shorter side of the training split's first image, at most 224.
    Raises: FileNotFoundError or ValueError naming what is missing.
    """
    train = _train_of(path)
    root = train if split == "train" else _test_of(path, train)
    if root is None:
        return None
    classes = _classes(train)
    if not classes:
        raise ValueError(
            f"{train} holds no folders: images are expected as {train}/CLASS/IMAGE, one folder "
            "for each class"
        )
    strange = sorted(set(_classes(root)) - set(classes))
    if strange:
        raise ValueError(f"class {strange[0]!r} is in {root}, but not in {train}")
    names, targets = _images(root, classes)
    if root == train:
        empty = sorted(set(range(len(classes))) - set(targets))
        if empty:
            raise ValueError(f"{root / classes[empty[0]]} holds no images ({_extensions()})")
    elif not targets:
        raise ValueError(f"the folders of {root} hold no images ({_extensions()})")
    files = FolderFiles(root, names)
    if not image_size:
        image_size = size_of(files if root == train else FolderFiles(train, _first(train, classes)))
    return Split(
        samples=Pictures(files, targets, image_size),
        name=split,
        num_classes=len(classes),
        input_shape=(3, image_size, image_size),
        class_names=classes,
        # Sizes would cost a look at each file: minutes for a million on a network drive.
        digest=digest_of("\0".join(classes).encode(errors="surrogateescape"), bytes(names)),
        is_decoding=True,
    )


def _train_of(path: Path) -> Path:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path} {what}: the data of folder:{path} must be there under this path on every "
            "machine with a worker"
        )
    # Pictures of trains may be in a folder of that name: a split holds folders, a class images.
    inner = path / "train"
    return inner if inner.is_dir() and _classes(inner) else path


def _test_of(path: Path, train: Path) -> Path | None:
    if train == path:
        return None
    for name in ("test", "val"):
        if (path / name).is_dir():
            return path / name
    return None


def _classes(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _images(root: Path, classes: list[str]) -> tuple[Names, list[int]]:
    names: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        if not (root / name).is_dir():
            continue  # of a test split: not every class has to be in it
        found = sorted(_walk(root / name, f"{name}/", set()))
        names += found
        targets += [target] * len(found)
    return Names(names), targets


def _first(train: Path, classes: list[str]) -> Names:
    """The first images of the training split: enough to choose a size by."""
    names: list[str] = []
    for name in classes:
        names += sorted(_walk(train / name, f"{name}/", set()))
        if len(names) >= SIZE_FROM:
            break
    return Names(names)


def _walk(folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Names of the images below a folder. seen: folders on the way here, for links in a circle."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in seen:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", seen | {here})
            elif Path(entry.name).suffix[1:].lower() in EXTENSIONS:
                yield prefix + entry.name


def _extensions() -> str:
    return "." + ", .".join(sorted(EXTENSIONS))
