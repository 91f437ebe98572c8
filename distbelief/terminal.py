"""Terminal: standard output and error that may go away while a run goes on."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO, cast

_GONE = frozenset({errno.EIO, errno.EPIPE, errno.EBADF, errno.ENXIO})
"""What writing gives when nobody can read any more: a closed terminal, a pipe to `head`."""


class Outliving:
    """A text stream that takes every write, also when what it writes to is gone.

    What is written then is lost. A run must not end because the window that it was started in
    was closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the file was closed
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._let_go(error)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _let_go(self, error: OSError | ValueError) -> None:
        """Point a dead descriptor at nothing: what lies in its buffer would fail again at exit."""
        if not isinstance(error, OSError) or error.errno not in _GONE:
            return  # a full disk may have space again
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


def outliving(stream: TextIO) -> TextIO:
    """The stream, able to outlive what it writes to."""
    if isinstance(stream, Outliving):
        return stream
    return cast(TextIO, Outliving(stream))  # it is one, by __getattr__


@contextlib.contextmanager
def outliving_output() -> Iterator[None]:
    """Inside, standard output and error outlive their terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outliving(sys.stdout), outliving(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
