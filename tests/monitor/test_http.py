"""The real server on the loopback, and a real client."""

import asyncio
import gzip
import json
import socket

import pytest

from distbelief.monitor import http
from distbelief.monitor.api import Api
from distbelief.monitor.http import listen
from distbelief.monitor.pages import Pages
from distbelief.monitor.stream import VIEWERS_MAX
from distbelief.problem import Problem
from tests.helpers.folders import make_run
from tests.helpers.watched import SECRET, Watched, messages, site

STREAM = "/api/v1/stream"


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "static"
    folder.mkdir()
    (folder / "index.html").write_text('<script src="app.js?v={{v}}"></script>' + " " * 500)
    (folder / "app.js").write_text("export const one = 1;")
    (folder / "notes.txt").write_text("not for others")
    (folder / "deeper").mkdir()
    return Pages(folder)


def run(test):
    """Run a test with a site of its own."""

    async def main():
        async with asyncio.timeout(30):
            await test()

    asyncio.run(main())


def test_every_answer_has_the_headers_of_security_and_none_that_allows_another_site(pages):
    async def test():
        async with site(pages=pages) as at:
            for path in ("/", "/app.js", "/api/v1/meta", "/nothing", "/healthz"):
                _, headers, _ = await at.get(path)
                assert headers["Content-Security-Policy"].startswith("default-src 'none'"), path
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert headers["Referrer-Policy"] == "no-referrer"
                assert "Cache-Control" in headers
                assert not any(h.lower().startswith("access-control") for h in headers)
            status, headers, _ = await at.get("/api/v1/meta", token="")
            assert status == 401
            assert "Content-Security-Policy" in headers

    run(test)


def test_without_the_secret_nothing_is_told_and_the_link_brings_it():
    async def test():
        async with site() as at:
            for path in ("/", "/api/v1/meta", STREAM, "/metrics", "/nothing"):
                status, _, body = await at.get(path, token="")
                assert status == 401
                assert json.loads(body)["error"]["code"] == "DB-API-401"
            status, headers, _ = await at.get(f"/?k={SECRET}", token="")
            assert (status, headers["Location"]) == (303, "./")
            cookie = headers["Set-Cookie"].partition(";")[0]
            status, _, body = await at.get("/api/v1/meta", token="", Cookie=cookie)
            assert status == 200
            assert json.loads(body)["run"] == "simulated"

    run(test)


def test_a_name_that_is_not_ours_is_refused():
    async def test():
        async with site() as at:
            for host in (
                "evil.example",
                f"evil.example:{at.port}",
                "localhost:1",
                "evil.example:80",
            ):
                status, _, body = await at.get("/api/v1/meta", Host=host)
                assert status == 403, host
                assert json.loads(body)["error"]["code"] == "DB-API-403"
            assert (await at.get("/api/v1/meta", Host=f"localhost:{at.port}"))[0] == 200

    run(test)


def test_files_are_asked_for_again_unless_they_are_named_by_their_version(pages):
    async def test():
        async with site(pages=pages) as at:
            status, headers, body = await at.get("/")
            assert status == 200
            assert headers["Content-Type"] == "text/html; charset=utf-8"
            assert headers["Cache-Control"] == "no-cache"
            assert f"app.js?v={pages.version}".encode() in body
            etag = headers["ETag"]
            status, headers, body = await at.get("/", If_None_Match=etag)
            assert (status, body) == (304, b"")
            status, headers, _ = await at.get(f"/app.js?v={pages.version}")
            assert "immutable" in headers["Cache-Control"]
            assert headers["Content-Type"] == "text/javascript; charset=utf-8"
            for query in ("", "?v=other"):
                _, headers, _ = await at.get(f"/app.js{query}")
                assert headers["Cache-Control"] == "no-cache"
            _, headers, body = await at.get("/", Accept_Encoding="gzip")
            assert headers["Content-Encoding"] == "gzip"
            assert b"app.js" in gzip.decompress(body)

    run(test)


def test_only_the_files_of_the_table_are_there(pages):
    async def test():
        async with site(pages=pages) as at:
            assert pages.names == ["app.js", "index.html"]
            for path in (
                "/notes.txt",
                "/deeper",
                "/../pyproject.toml",
                "/%2e%2e/x",
                "/index.html/",
            ):
                assert (await at.get(path))[0] == 404, path

    run(test)


def test_long_answers_are_packed():
    async def test():
        async with site(Watched(num_workers=12)) as at:
            _, headers, body = await at.get("/api/v1/workers", Accept_Encoding="gzip")
            assert headers["Content-Encoding"] == "gzip"
            assert json.loads(gzip.decompress(body)) == at.watched.store.workers()

    run(test)


def test_other_methods_are_refused():
    async def test():
        async with site() as at:
            headers = {"X-DB-Token": SECRET}
            for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
                async with at.session.request(method, at.url + "/", headers=headers) as r:
                    assert r.status == 405
                    assert not any(h.lower().startswith("access-control") for h in r.headers)
            async with at.session.head(at.url + "/api/v1/meta", headers=headers) as r:
                assert r.status == 200
                assert await r.read() == b""

    run(test)


def test_an_action_comes_through_and_a_form_of_another_site_does_not(tmp_path):
    folder = make_run(tmp_path, "aa")

    async def test():
        async with site(folder=folder, actions=True) as at:
            url = at.url + "/api/v1/actions/stop"
            cookie = f"distbelief-{at.port}={SECRET}"
            form = {"Cookie": cookie, "Content-Type": "application/x-www-form-urlencoded"}
            for headers, status in (
                (form, 415),
                ({**form, "Content-Type": "text/plain"}, 415),
                ({"Cookie": cookie, "Content-Type": "application/json"}, 403),
                ({"Content-Type": "application/json", "X-DB-Token": "page"}, 401),
                ({"X-DB-Token": SECRET, "Origin": "http://evil.example"}, 403),
            ):
                async with at.session.post(url, headers=headers, data=b"{}") as r:
                    assert r.status == status
            assert folder.asked_stop() == 0
            page = {"Cookie": cookie, "Content-Type": "application/json", "X-DB-Token": "page"}
            async with at.session.post(url, headers=page, data=b"x" * 5000) as r:
                assert r.status == 413
            async with at.session.post(url, headers={**page, "Origin": at.url}, data=b"{}") as r:
                assert r.status == 202
            assert folder.asked_stop() == 1

    run(test)


def test_what_fails_here_is_answered_and_logged(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(Api, "get", fail)

    async def test():
        async with site() as at:
            status, _, body = await at.get("/api/v1/meta")
            assert status == 500
            assert b"nobody" not in body
            assert "nobody foresaw this" in caplog.text

    run(test)


@pytest.mark.parametrize("root", ["", "/a/b"])
def test_it_works_behind_a_prefix_whether_or_not_the_proxy_cuts_it_off(pages, root):
    async def test():
        async with site(pages=pages, root_path=root) as at:
            for prefix in dict.fromkeys(("", root)):
                status, headers, _ = await at.get(f"{prefix}/?k={SECRET}", token="")
                assert (status, headers["Location"]) == (303, "./")
                assert "Path=" not in headers["Set-Cookie"]
                for path in ("/", "/app.js", "/api/v1/meta", "/healthz"):
                    assert (await at.get(prefix + path))[0] == 200
            if root:
                status, headers, _ = await at.get(root)
                assert (status, headers["Location"]) == (308, "./b/")
                assert (await at.get("/a/bc/api/v1/meta"))[0] == 404

    run(test)


# The stream


def watch(at, **headers):
    sent = {"X-DB-Token": SECRET, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return at.session.get(at.url + STREAM, headers=sent)


def test_the_stream_says_what_it_is_and_tells_as_it_happens():
    async def test():
        async with site() as at, watch(at) as r:
            assert r.headers["Content-Type"] == "text/event-stream"
            assert r.headers["X-Accel-Buffering"] == "no"
            assert r.headers["Cache-Control"] == "no-store"
            first = await messages(r, 2)
            assert [kind for _, kind, _ in first] == ["meta", "tick"]
            at.watched.happen("a thing")
            at.go_on()
            (_, kind, data), (tick_id, last, _) = await messages(r, 2)
            assert (kind, last) == ("event", "tick")
            assert json.loads(data)["text"] == "a thing"
            assert int(tick_id) == at.watched.store.seq

    run(test)


def test_who_comes_back_goes_on_without_a_gap():
    async def test():
        async with site() as at:
            async with watch(at) as r:
                *_, (last, _, _) = await messages(r, 2)
            for _ in range(5):
                at.go_on()
            at.watched.happen("while away")
            async with watch(at, Last_Event_ID=last) as r:
                found = [int(id) for id, _, _ in await messages(r, 6) if id]
            assert found == list(range(int(last) + 1, int(last) + 7))

    run(test)


def test_a_number_of_another_process_makes_it_begin_anew():
    async def test():
        async with site() as at:
            for last, resync in (("999999", True), ("x; drop", None)):
                async with watch(at, Last_Event_ID=last) as r:
                    ((_, kind, data),) = await messages(r, 1)
                    assert kind == "meta"
                    assert json.loads(data).get("resync") is resync

    run(test)


def test_only_so_many_may_look_at_once():
    async def test():
        async with site() as at:
            headers = f"GET {STREAM} HTTP/1.1\r\nHost: 127.0.0.1:{at.port}\r\nX-DB-Token: {SECRET}"
            writers = []
            for _ in range(VIEWERS_MAX):
                reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
                writer.write(headers.encode() + b"\r\n\r\n")
                await reader.readuntil(b"event: tick")
                writers.append(writer)
            assert at.watched.stream.num_viewers == VIEWERS_MAX
            status, headers_65, body = await at.get(STREAM)
            assert (status, headers_65["Retry-After"]) == (503, "5")
            assert json.loads(body)["error"]["code"] == "DB-API-503"
            for writer in writers:
                writer.close()
                await writer.wait_closed()
            while at.watched.stream.num_viewers:
                at.go_on()  # it is by writing that a closed tab is seen
                await asyncio.sleep(0.01)
            async with watch(at) as r:
                assert r.status == 200

    run(test)


def test_closed_tabs_leave_no_trace_in_the_log(caplog):
    async def test():
        async with site() as at:
            for _ in range(5):
                async with watch(at) as r:
                    await messages(r, 1)
                at.go_on()
            while at.watched.stream.num_viewers:
                at.go_on()
                await asyncio.sleep(0.01)

    run(test)
    assert not caplog.records


async def connect(at):
    """A viewer with little room for what it does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 262144)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", at.port))
    head = f"GET {STREAM} HTTP/1.1\r\nHost: 127.0.0.1:{at.port}\r\nX-DB-Token: {SECRET}\r\n"
    await loop.sock_sendall(sock, head.encode() + b"\r\n")
    while not at.watched.stream.num_viewers:
        await asyncio.sleep(0.01)
    return sock


def test_a_slow_reader_costs_no_memory_and_gets_the_newest_when_it_reads_again():
    async def test():
        async with site() as at:
            sock = await connect(at)
            for _ in range(300):  # more than the kernel takes, less than the ring
                at.tell(50_000)
                await asyncio.sleep(0)
            assert at.buffered < 256 * 1024
            newest = f"id: {at.watched.stream.ring.newest}\n".encode()
            read = b""
            while newest not in read:
                read += await asyncio.get_running_loop().sock_recv(sock, 2**20)
            assert read.count(b"event: tick") < 290
            sock.close()

    run(test)


def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(http, "WRITE_TIMEOUT_S", 0.2)

    async def test():
        async with site() as at:
            sock = await connect(at)
            while at.watched.stream.num_viewers:
                at.tell(50_000)
                await asyncio.sleep(0)
            sock.close()

    run(test)


def test_where_nothing_happens_a_comment_keeps_the_connection(monkeypatch):
    monkeypatch.setattr(http, "COMMENT_S", 0.02)

    async def test():
        async with site() as at, watch(at) as r:
            await messages(r, 2)
            assert (await r.content.readline()).startswith(b":")

    run(test)


def test_viewers_have_its_last_words():
    async def test():
        async with site() as at, watch(at) as r:
            await messages(r, 2)
            at.watched.stream.end("ended", at.watched.now)
            at.server.wake()
            ((_, kind, data),) = await messages(r, 1)
            assert (kind, json.loads(data)["reason"]) == ("bye", "ended")
            assert await r.content.read() == b""

    run(test)


# Ports


def test_a_port_that_is_named_is_taken_or_it_is_said_why_not():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(Problem) as caught:
            listen("127.0.0.1", port)
        assert caught.value.code == "DB-ENV-005"
        assert str(port) in str(caught.value)
        assert "--port" in caught.value.fix


def test_without_one_it_is_the_usual_port_or_the_one_before_or_any(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        usual = free.getsockname()[1]
    monkeypatch.setattr(http, "PORT", usual)
    with listen("127.0.0.1") as first, listen("127.0.0.1") as second:
        assert first.getsockname()[1] == usual
        other = second.getsockname()[1]
        assert other not in (usual, 0)
    with listen("127.0.0.1", wish=other) as again:
        assert again.getsockname()[1] == other


def test_an_address_that_is_not_ours_is_said_so():
    with pytest.raises(Problem) as caught:
        listen("192.0.2.1")
    assert caught.value.code == "DB-ENV-005"
    assert "address of this machine" in caught.value.why
