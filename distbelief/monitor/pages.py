"""Pages: the static files of the dashboard, by name. What is not in the table is not there."""

import gzip
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json; charset=utf-8",
}
"""By the end of a name; other files are not served."""
INDEX = "index.html"
VERSION_MARK = b"{{v}}"
"""In an HTML file: stands for the version of all files together, as in `page.js?v={{v}}`."""
FOREVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"


@dataclass(frozen=True, slots=True)
class Page:
    """One file, as it is served."""

    body: bytes
    packed: bytes
    """The same as gzip."""
    content_type: str
    etag: str

    def headers(self, is_versioned: bool) -> dict[str, str]:
        """is_versioned: it was asked for by its version, so it will never be another one."""
        return {
            "ETag": self.etag,
            "Cache-Control": FOREVER if is_versioned else ASK_AGAIN,
            "Vary": "Accept-Encoding",
        }


class Pages:
    """See the top of this file. Read once."""

    def __init__(self, folder: Traversable | None = None) -> None:
        """folder: by default the package's own."""
        folder = files("distbelief.monitor") / "static" if folder is None else folder
        raw: dict[str, bytes] = {}
        if folder.is_dir():
            raw = {
                one.name: one.read_bytes()
                for one in sorted(folder.iterdir(), key=lambda one: one.name)
                if _type(one.name) and one.is_file()
            }
        whole = hashlib.sha256(b"".join(name.encode() + body for name, body in raw.items()))
        self.version = whole.hexdigest()[:12]
        self._table = {name: self._page(name, body) for name, body in raw.items()}

    @property
    def names(self) -> list[str]:
        return list(self._table)

    def text(self, name: str) -> str:
        """Raises: KeyError for no such file."""
        return self._table[name].body.decode()

    def get(self, path: str) -> Page | None:
        """What is at a path: / is the index."""
        return self._table.get(path.removeprefix("/") or INDEX)

    def _page(self, name: str, body: bytes) -> Page:
        if name.endswith(".html"):
            body = body.replace(VERSION_MARK, self.version.encode())
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        return Page(body, gzip.compress(body, 9, mtime=0), _type(name), etag)


def _type(name: str) -> str:
    return TYPES.get(name.rpartition(".")[2], "")
