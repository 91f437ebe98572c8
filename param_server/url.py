"""URL: file systems by fsspec (s3://, gs://, sftp:// ...), whose errors become OSErrors here."""

import contextlib
from collections.abc import Iterator
from typing import Any


def is_url(path: str) -> bool:
    """Whether it is of another file system than this machine's."""
    return "://" in path


def file_system_of(url: str) -> tuple[Any, str]:  # Any: fsspec is not typed
    """The file system of a URL, and its path there.

    Raises: ValueError for a protocol that there is not, or that needs a package that is not here.
    """
    from fsspec.core import url_to_fs  # most commands need none

    try:
        found: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:  # of the package for its protocol
        raise ValueError(str(error)) from error
    return found


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Stores raise errors of their own packages: here they are OSErrors."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} is not there: {error}") from error
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
