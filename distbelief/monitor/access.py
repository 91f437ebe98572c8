"""Access: who may ask the monitor for what, and with which headers every answer leaves. Pure.

Whoever asks must have the secret of the run: in the link that was printed, which brings a cookie,
in that cookie, or in a header. Cookies know no ports, so the cookie's name has the port in it.
The name in `Host` must be one of ours: otherwise a page of another site, whose name was made to
point here (DNS rebinding), could read all this with the browser's own cookies. Addresses written in
digits cannot be made to point elsewhere.
"""

import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Literal
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from distbelief.monitor.source import Json

KEY = "k"
"""Of the secret, in the printed link."""
TOKEN_HEADER = "X-DB-Token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")
ANY = "*"
UNGUARDED = ("/healthz", "/readyz")
"""They say yes or no, to probes that know neither the name nor the secret."""
COOKIE_MAX = 4096

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; worker-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer, unless it says otherwise. None of them allows another site anything."""

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Admit:
    """It may come in."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """To the same page without the secret in its address, which the cookie has now."""

    location: str
    """Relative, so that it holds behind any prefix."""
    cookie: str
    """Value of Set-Cookie. It names no path: the browser takes that of the page, prefix and all."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """It may not."""

    status: Literal[401, 403]
    message: str
    hint: str


class Access:
    """See the top of this file."""

    def __init__(
        self, secret: str, host: str = "127.0.0.1", port: int = 0, hosts: Sequence[str] = ()
    ) -> None:
        """secret: empty lets everybody in who reaches the address, which must be of the loopback.

        hosts: other names that may be asked for, with a port, or without for any.
        Raises: ValueError for an address that others can reach, without a secret.
        """
        if not secret and not is_loopback(host):
            raise ValueError(f"{host} can be reached by others: there must be a secret")
        self._secret = secret.encode()
        self._port = str(port)
        self._is_wildcard = host in WILDCARDS
        own = (*LOOPBACK,) if self._is_wildcard else (*LOOPBACK, host.lower())
        self._names = {(name, self._port) for name in own}
        for one in hosts:
            match = _HOST.fullmatch(one.strip())
            if match is None:
                raise ValueError(f"{one!r} is no name of a host, or name:port")
            self._names.add((_bare(match[1]), match[2] or ANY))

    @property
    def has_secret(self) -> bool:
        return bool(self._secret)

    def judge(
        self, method: str, path: str, query: str, headers: Mapping[str, str]
    ) -> Admit | Redirect | Refuse:
        """headers: names in any case are theirs to find."""
        if method in ("GET", "HEAD") and path in UNGUARDED:
            return Admit()
        host = headers.get("Host", "")
        if not self.knows(host):
            return Refuse(
                403,
                f"This is not served to the name {host[:80]!r}.",
                "Use the printed link. For a proxy or another port, allow its name: "
                "--set monitor.hosts=NAME or NAME:PORT.",
            )
        origin = headers.get("Origin")
        if method not in ("GET", "HEAD") and origin is not None and not _is_of(origin, host):
            return Refuse(403, "Another site asked for this.", "Use the page of this address.")
        if not self._secret:
            return Admit()
        asked = parse_qsl(query, keep_blank_values=True)
        key = next((value for name, value in asked if name == KEY), None)
        if key is not None and self._is_secret(key):
            if method not in ("GET", "HEAD"):
                return Admit()
            rest = urlencode([pair for pair in asked if pair[0] != KEY])
            page = "./" + quote(path.rpartition("/")[2])
            return Redirect(page + (f"?{rest}" if rest else ""), self._set_cookie(host))
        bearer = headers.get("Authorization", "")
        shown = [headers.get(TOKEN_HEADER, ""), self._cookie(headers)]
        if bearer[:7].lower() == "bearer ":
            shown.append(bearer[7:].strip())
        # All are compared, so that the time it takes tells nothing.
        if any([self._is_secret(one) for one in shown]):
            return Admit()
        return Refuse(
            401,
            "The secret of this run is missing or wrong.",
            f"Open the link that launch printed (distbelief dashboard RUN prints it again), "
            f"or send it as {TOKEN_HEADER}.",
        )

    def knows(self, host: str) -> bool:
        """Whether a request may ask for this `Host`."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name, port = _bare(match[1]), match[2] or "80"
        if (name, port) in self._names or (name, ANY) in self._names:
            return True
        return self._is_wildcard and port == self._port and _is_address(name)

    def _is_secret(self, shown: str) -> bool:
        return hmac.compare_digest(shown.encode(errors="surrogateescape"), self._secret)

    def _set_cookie(self, host: str) -> str:
        value = self._secret.decode()
        return f"{_cookie_name(host)}={value}; HttpOnly; SameSite=Strict; Max-Age=2592000"

    def _cookie(self, headers: Mapping[str, str]) -> str:
        try:
            cookies = SimpleCookie(headers.get("Cookie", "")[:COOKIE_MAX])
        except CookieError:
            return ""
        morsel = cookies.get(_cookie_name(headers.get("Host", "")))
        return "" if morsel is None else morsel.value


def error(status: int, message: str, hint: str = "") -> Json:
    """What is answered instead of what was asked for."""
    return {"error": {"code": f"DB-API-{status}", "message": message, "hint": hint}}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _cookie_name(host: str) -> str:
    """By the port that the browser sees: through a tunnel it is not ours."""
    match = _HOST.fullmatch(host)
    return f"distbelief-{(match and match[2]) or '80'}"


def _bare(name: str) -> str:
    return name.strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_of(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
