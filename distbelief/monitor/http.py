"""Http: serves the API, the stream and the pages. The only file that knows aiohttp.

All addresses in it are relative, and it answers with and without the prefix of a proxy, so it works
behind one that cuts its prefix off and behind one that does not.
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

from aiohttp import web

from distbelief.monitor.access import Access, Redirect, Refuse, error
from distbelief.monitor.api import BODY_MAX, Api, Reply, complete, packed
from distbelief.monitor.pages import Pages
from distbelief.monitor.stream import COMMENT, COMMENT_S, VIEWERS_MAX, Viewer
from distbelief.problem import Problem

logger = logging.getLogger(__name__)

PORT = 8787
"""Where it is, unless somebody else is there."""
STREAM = "/api/v1/stream"
WRITE_BYTES = 32 * 1024
"""At once, where there are many messages."""
WRITE_TIMEOUT_S = 30.0
"""A viewer that takes nothing for so long is cut off; it comes back by itself."""
BODY_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
BACKLOG = 128


def listen(host: str, port: int = 0, wish: int = 0) -> socket.socket:
    """A listening socket. port: 0 for `wish`, or PORT, or where they are taken any.

    Raises: Problem if there is none to be had.
    """
    tries = [port] if port else [*filter(None, (wish, PORT)), 0]
    last: OSError | None = None
    for one in dict.fromkeys(tries):
        try:
            return _bound(host, one)
        except OSError as failed:
            last = failed
            if failed.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    assert last is not None
    raise Problem(
        "DB-ENV-005",
        f"cannot listen at {host} port {port or 'any'}: {last.strerror or last}",
        why="another run, or another program, may be using it"
        if last.errno == errno.EADDRINUSE
        else "is that an address of this machine?",
        fix="name another --port (monitor.port), or leave it out for a free one",
    )


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Server:
    """See the top of this file. Used by one thread, that of its loop."""

    def __init__(self, api: Api, access: Access, pages: Pages, root_path: str = "") -> None:
        """root_path: the prefix of a proxy that does not cut it off, such as /runs/7."""
        self._api = api
        self._stream = api.stream
        self._access = access
        self._pages = pages
        self._root = root_path.rstrip("/")
        self._news = asyncio.Event()
        self._runner: web.ServerRunner | None = None

    async def start(self, sock: socket.socket) -> None:
        """Serve what comes to a listening socket, which is ours from now on."""
        server = web.Server(self._handle, access_log=None, keepalive_timeout=30.0)
        self._runner = web.ServerRunner(server, shutdown_timeout=CLOSE_TIMEOUT_S)
        await self._runner.setup()
        await web.SockSite(self._runner, sock, backlog=BACKLOG).start()

    def wake(self) -> None:
        """There is news in the stream."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def close(self) -> None:
        """Once the stream is over: let viewers have its last words, and close."""
        self.wake()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("method=%s path=%s", request.method, request.path)
            return _response(Reply.json(error(500, "The monitor failed.", "See its log."), 500))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path, query = request.path, request.rel_url.raw_query_string
        if self._root and path == self._root:
            where = f"./{path.rpartition('/')[2]}/" + (f"?{query}" if query else "")
            return _response(Reply(308, b"", headers={"Location": where}))
        if self._root and path.startswith(self._root + "/"):
            path = path[len(self._root) :]
        verdict = self._access.judge(request.method, path, query, request.headers)
        if isinstance(verdict, Refuse):
            body = error(verdict.status, verdict.message, verdict.hint)
            return _response(Reply.json(body, verdict.status))
        if isinstance(verdict, Redirect):
            headers = {"Location": verdict.location, "Set-Cookie": verdict.cookie}
            return _response(Reply(303, b"", headers=headers))
        if request.method == "POST":
            return _response(await self._post(request, path))
        if request.method not in ("GET", "HEAD"):
            refusal = Reply.json(error(405, f"{request.method[:16]} is not known here."), 405)
            return _response(refusal)
        if path == STREAM:
            return await self._watch(request)
        encoding = request.headers.get("Accept-Encoding", "")
        page = self._page(request, path, query, encoding)
        if page is not None:
            return _response(page)
        reply = self._api.get(path, query, request.headers.get("Accept", ""))
        return _response(packed(reply, encoding))

    async def _post(self, request: web.BaseRequest, path: str) -> Reply:
        length = request.content_length
        if length is None or length > BODY_MAX:
            return Reply.json(error(413, f"The body may have {BODY_MAX} bytes."), 413)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.content.readexactly(length)
        except (TimeoutError, asyncio.IncompleteReadError):
            return Reply.json(error(408, "The body did not come."), 408)
        return self._api.post(path, request.headers, body)

    def _page(self, request: web.BaseRequest, path: str, query: str, encoding: str) -> Reply | None:
        page = self._pages.get(path)
        if page is None:
            return None
        headers = page.headers(query == f"v={self._pages.version}")
        if request.headers.get("If-None-Match") == page.etag:
            return Reply(304, b"", page.content_type, headers)
        if "gzip" in encoding and len(page.packed) < len(page.body):
            headers["Content-Encoding"] = "gzip"
            return Reply(200, page.packed, page.content_type, headers)
        return Reply(200, page.body, page.content_type, headers)

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        """One viewer, for as long as it stays."""
        stream = self._stream
        if stream.num_viewers >= VIEWERS_MAX:
            text = f"{VIEWERS_MAX} are looking already."
            hint = "Close another tab, or ask for api/v1/delta."
            refusal = Reply.json(error(503, text, hint), 503, **{"Retry-After": "5"})
            return _response(refusal)
        # A page that opens a new one has no such header to set.
        last = request.headers.get("Last-Event-ID") or request.query.get("after", "")
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 17 else None
        headers = complete(Reply(200, b"", "text/event-stream", {"X-Accel-Buffering": "no"}))
        response = web.StreamResponse(headers=headers)
        stream.num_viewers += 1
        try:
            await response.prepare(request)
            viewer = Viewer(stream, after)
            while True:
                news, is_over = self._news, stream.is_over  # before it looks
                for data in _joined(viewer.take()):
                    await self._write(response, data)
                if is_over:
                    break
                try:
                    async with asyncio.timeout(COMMENT_S):
                        await news.wait()
                except TimeoutError:
                    await self._write(response, COMMENT)
        except (ConnectionError, TimeoutError) as gone:
            logger.debug("a viewer is gone: %s", gone)
            if request.transport is not None:
                request.transport.abort()
        finally:
            stream.num_viewers -= 1
        return response

    @staticmethod
    async def _write(response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)


def _joined(pieces: list[bytes]) -> Iterator[bytes]:
    """Fewer and longer ones, as each costs a call of the kernel; a long one stays what it is."""
    size = 0
    some: list[bytes] = []
    for piece in pieces:
        if size + len(piece) > WRITE_BYTES and some:
            yield b"".join(some)
            size, some = 0, []
        some.append(piece)
        size += len(piece)
    if some:
        yield some[0] if len(some) == 1 else b"".join(some)


def _response(reply: Reply) -> web.Response:
    headers = complete(reply)
    if reply.status in (303, 304, 308):
        del headers["Content-Type"]
    response = web.Response(status=reply.status, body=reply.body or None, headers=headers)
    with contextlib.suppress(KeyError):
        del response.headers["Server"]
    return response
