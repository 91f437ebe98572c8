"""Link: the file by which other commands find a run's monitor. It has the secret, so it is 0600.

RUN/monitor.json    {"url", "pid", "feed", "host", "began"}, while the monitor lives
"""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distbelief.folder import began_at

NAME = "monitor.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Where a monitor serves."""

    url: str = field(repr=False)
    """With its secret."""
    pid: int
    feed: str
    """Where it takes reports; empty where it takes none."""
    host: str
    began: str
    """The kernel's start time of that pid: a later process may have the same number."""

    @classmethod
    def of_this_process(cls, url: str, feed: str) -> "Link":
        pid = os.getpid()
        return cls(url=url, pid=pid, feed=feed, host=socket.gethostname(), began=began_at(pid))

    @property
    def is_alive(self) -> bool:
        """Whether it still serves, as far as this machine can see."""
        return self.host != socket.gethostname() or began_at(self.pid) == self.began

    def write(self, run_path: Path) -> None:
        """Raises: OSError."""
        part = run_path / f".{NAME}.{self.pid}"
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        part.replace(run_path / NAME)

    def remove(self, run_path: Path) -> None:
        """Unless it is another one's by now."""
        with contextlib.suppress(OSError):
            if read_link(run_path) == self:
                (run_path / NAME).unlink()


def read_link(run_path: Path) -> Link | None:
    """None where there is none, or it cannot be read."""
    try:
        data = json.loads((run_path / NAME).read_text(encoding="utf-8"))
        link = Link(**{name: data[name] for name in ("url", "pid", "feed", "host", "began")})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_well = isinstance(link.pid, int) and all(
        isinstance(text, str) for text in (link.url, link.feed, link.host, link.began)
    )
    return link if is_well else None
