"""Data: from the name of a source to a split of it. Real data that needs no download comes first.

digits                 see embedded.py
fashion-mnist[:PATH]   see embedded.py
folder:PATH            images in folders named after their classes; see folder.py
wds:PATTERN            WebDataset shards; see tars.py
module:function        the user's own; see own.py
"""

import re
from pathlib import Path

from distbelief.workers.embedded import FASHION_MNIST, open_digits, open_fashion_mnist
from distbelief.workers.folder import open_folder
from distbelief.workers.own import open_own
from distbelief.workers.split import SPLITS, Split
from distbelief.workers.tars import open_tars

SOURCES = "digits, fashion-mnist[:PATH], folder:PATH, wds:PATTERN, module:function"

_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_split(source: str, split: str, image_size: int = 0) -> Split | None:
    """Open a split of a source; None if the source has no test split.

    image_size: images become this square; 0 takes what suits the source. A user's own data
        stays as it is.
    Raises: ValueError or OSError naming what is wrong and what to do; own.UserError, a
        ValueError, for the user's own code.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if image_size < 0:
        raise ValueError(f"image_size must be at least 0, got {image_size}")
    kind, colon, path = source.partition(":")
    if kind == "digits" and not colon:
        return open_digits(split, image_size)
    if kind == "fashion-mnist":
        folder = Path(path).expanduser() if path else FASHION_MNIST
        return open_fashion_mnist(folder, split, image_size)
    if kind == "folder" and path:
        return open_folder(Path(path).expanduser(), split, image_size)
    if kind == "wds" and path:
        return open_tars(path, split, image_size)
    if kind not in ("digits", "folder", "wds") and _OWN.fullmatch(source):
        return open_own(source, split)
    raise ValueError(f"data source {source!r} is none of {SOURCES}")
