import gzip
import json
import os

import pytest

from distbelief.monitor.api import LOG_BYTES, NAMES_MAX, Api, Reply, packed
from distbelief.monitor.source import Heatmap
from tests.helpers.folders import make_run
from tests.helpers.watched import Watched

V1 = "/api/v1/"
JSON = {"Content-Type": "application/json", "X-DB-Token": "page"}


@pytest.fixture(scope="module")
def watched():
    return Watched(num_workers=12, seconds=30, per_node=4)


@pytest.fixture
def api(watched):
    return Api(watched.store, watched.stream)


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path, "aa")


@pytest.fixture
def acting(watched, folder):
    return Api(watched.store, watched.stream, folder, actions=True)


def told(reply, status=200):
    assert reply.status == status, reply.body
    return json.loads(reply.body)


def refused(reply, status, *words):
    error = told(reply, status)["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"] == f"DB-API-{status}"
    for word in words:
        assert word in error["message"] + error["hint"]


ROUTES = {
    "meta": "meta",
    "snapshot": "snapshot",
    "workers": "workers",
    "workers/w3": "worker",
    "series?names=loss,staleness.p95": "series",
    "distribution": "distribution",
    "updates": "updates",
    "meter": "meter",
    "shards": "shards",
    "events": "events",
    "findings": "findings",
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_with_what_the_source_says(api, watched, route):
    path, _, query = route.partition("?")
    data = told(api.get(V1 + path, query))
    assert data["seq"] == watched.store.seq
    assert data["t"] == watched.now
    if not query and "/" not in route:
        # Through JSON: a tuple is a list there.
        assert data == json.loads(json.dumps(getattr(watched.store, ROUTES[route])()))


@pytest.mark.parametrize("route", [*ROUTES, "heatmap", "delta?after=0"])
def test_no_route_takes_a_parameter_that_it_does_not_know(api, route):
    path, _, query = route.partition("?")
    refused(api.get(V1 + path, f"{query}&odd=1"), 400, "'odd'", "Known: ")


@pytest.mark.parametrize(
    ("path", "query", "word"),
    [
        ("workers", "sort=nothing", "nothing"),
        ("workers", "limit=0", "from 1 to 1000"),
        ("workers", "limit=1001", "from 1 to 1000"),
        ("workers", "limit=x", "number"),
        ("workers", "limit=1.5", "whole"),
        ("workers", "limit=nan", "number"),
        ("workers", "limit=5&limit=6", "twice"),
        ("workers", "status=slow,odd", "'odd'"),
        ("workers", "cursor=%00", "cursor"),
        ("workers", "q=" + "x" * 81, "too long"),
        ("workers/w0", "window=0", "window"),
        ("workers/w0", "window=inf", "window"),
        ("series", "", "names"),
        ("series", "names=odd", "odd"),
        ("series", "names=loss&points=1", "points"),
        ("series", "names=loss&points=5001", "points"),
        ("series", "names=loss&from=2&to=1", "before"),
        ("series", "names=loss&from=nan", "from"),
        ("heatmap", "cols=0", "cols"),
        ("heatmap", "cols=2001", "cols"),
        ("heatmap", "rows=0", "rows"),
        ("heatmap", "rows=5000&cols=2000", "cells"),
        ("heatmap", "group=odd", "node, worker, worst"),
        ("heatmap", "metric=odd", "ratio, updates, seconds"),
        ("distribution", "window=601", "window"),
        ("updates", "n=5001", "n is"),
        ("events", "kind=odd", "'odd'"),
        ("events", "after=-2", "after"),
        ("events", "after=1e300", "after"),
        ("delta", "after=x", "after"),
        ("meta", "&".join(f"a{i}=1" for i in range(40)), "too many"),
    ],
)
def test_a_bad_parameter_is_refused_with_what_and_a_hint(api, path, query, word):
    refused(api.get(V1 + path, query), 400, word)


@pytest.mark.parametrize(
    "path", ["/nothing", V1, V1 + "nothing", V1 + "workers/", V1 + "workers/w99", "/logs/w0", "//"]
)
def test_what_is_not_there_is_not_found(api, path):
    refused(api.get(path), 404)


def test_an_unknown_worker_is_answered_with_where_they_are_listed(api):
    refused(api.get(V1 + "workers/w99"), 404, "'w99'", "GET /api/v1/workers")


def test_workers_are_found_page_by_page(api):
    first = told(api.get(V1 + "workers", "limit=5&sort=id"))
    second = told(api.get(V1 + "workers", f"limit=5&sort=id&cursor={first['next']}"))
    assert first["total"] == 12
    assert len({item["id"] for item in first["items"] + second["items"]}) == 10
    assert [i["id"] for i in told(api.get(V1 + "workers", "q=w11"))["items"]] == ["w11"]


def test_the_heatmap_is_bytes_and_its_header_says_what_they_are(api, watched):
    reply = api.get(V1 + "heatmap", f"from={watched.now - 20}&to={watched.now}&cols=10")
    assert reply.content_type == "application/octet-stream"
    head = json.loads(reply.headers["X-DB-Heatmap"])
    assert len(reply.body) == head["rows"] * head["cols"]
    assert head["ids"] == watched.store.heatmap(watched.now - 20, watched.now, 10).ids
    assert len(head["nodes"]) == head["rows"] == 12
    assert set(reply.body) - {0, 1}, "there is something to be seen"
    assert reply.headers["X-DB-Heatmap"].isascii()
    assert "\n" not in reply.headers["X-DB-Heatmap"]


def test_names_of_a_large_heatmap_follow_its_cells_and_the_header_stays_short(watched):
    class Large:
        seq = 1

        def meta(self):
            return {"t": 1.0}

        def heatmap(self, *_):
            ids = [f"w{i}" for i in range(1000)]
            nodes = ["nöde\r\nX: 1"] * 1000
            return Heatmap(1000, 2, 0.0, 1.0, ids, nodes, -2, 6, bytes(2000))

    reply = Api(Large(), watched.stream).get(V1 + "heatmap")  # type: ignore[arg-type]
    text = reply.headers["X-DB-Heatmap"]
    assert len(text) < NAMES_MAX
    head = json.loads(text)
    assert head["names"] == 2000
    names = json.loads(reply.body[2000:])
    assert names["ids"][999] == "w999"
    assert names["nodes"][0] == "nöde\r\nX: 1"


def test_what_viewers_share_is_made_once_until_there_is_news():
    watched = Watched()
    api = Api(watched.store, watched.stream)
    first = api.get(V1 + "snapshot")
    assert api.get(V1 + "snapshot") is first
    assert api.get(V1 + "workers", "limit=2") is not api.get(V1 + "workers", "limit=3")
    watched.go_on()
    assert api.get(V1 + "snapshot") is not first


def test_delta_goes_on_or_says_that_one_must_begin_anew(api, watched):
    assert told(api.get(V1 + "delta", f"after={watched.store.seq}")) == []
    refused(api.get(V1 + "delta", "after=999999"), 410, "resync", "snapshot")
    assert told(api.get(V1 + "delta", "after=999999"), 410)["resync"] is True


def test_probes_say_whether_it_lives_and_whether_shards_were_seen(api):
    assert told(api.get("/healthz")) == {"ok": True}
    assert told(api.get("/readyz")) == {"ok": True}
    nobody = Watched(seconds=0)
    assert told(Api(nobody.store, nobody.stream).get("/readyz"), 503) == {"ok": False}


def test_metrics_and_the_report_are_made_by_those_who_know_them(watched):
    class Scrape:
        def render(self, source, accept):
            assert source is watched.store
            return f"# {accept}\n".encode(), "text/plain; version=0.0.4"

    class Report:
        def render(self, source):
            assert source is watched.store
            return b"<p>", "csp"

    api = Api(watched.store, watched.stream, scrape=Scrape(), report=Report())
    reply = api.get("/metrics", "", "text/plain")
    assert (reply.body, reply.content_type) == (b"# text/plain\n", "text/plain; version=0.0.4")
    reply = api.get("/report.html")
    assert (reply.body, reply.headers["Content-Security-Policy"]) == (b"<p>", "csp")
    api = Api(watched.store, watched.stream)
    refused(api.get("/metrics"), 404)
    refused(api.get("/report.html"), 404, "distbelief report")


# Logs


def logs(watched, folder):
    return Api(watched.store, watched.stream, folder)


def log_of(watched, folder, name, query=""):
    reply = logs(watched, folder).get(f"/logs/{name}", query)
    assert (reply.status, reply.content_type) == (200, "text/plain; charset=utf-8")
    return reply.body.decode().splitlines()


def test_the_last_lines_of_a_processes_log_are_told(watched, folder):
    (folder.logs / "w1.log").write_text("".join(f"line {i}\n" for i in range(100)) + "not whole")
    (folder.logs / "shard0.log").write_bytes(b"\x1b[31m<img onerror=x>\xff\r\n")
    assert log_of(watched, folder, "w1", "lines=3") == ["line 98", "line 99", "not whole"]
    assert log_of(watched, folder, "shard0") == ["\x1b[31m<img onerror=x>�"]
    assert log_of(watched, folder, "w2") == []


def test_what_a_process_has_printed_stands_before_its_log(watched, folder):
    (folder.logs / "w1.out").write_text("printed\n")
    (folder.logs / "w1.log").write_text("logged\n")
    assert log_of(watched, folder, "w1") == ["printed", "logged"]


def test_of_a_long_log_only_the_end_is_read(watched, folder):
    (folder.logs / "w1.log").write_text("x" * 100 + "\n" + ("y" * 1000 + "\n") * 500)
    lines = log_of(watched, folder, "w1", "lines=1000")
    assert 0 < sum(map(len, lines)) <= LOG_BYTES
    assert set(lines) == {"y" * 1000}


@pytest.mark.parametrize(
    "name", ["..", ".", "../config", "w1.log", "%2e%2e", "config", "w99", "", "W1"]
)
def test_no_other_file_is_told(watched, folder, name):
    (folder.path / "config.log").write_text("secret")
    refused(logs(watched, folder).get(f"/logs/{name}"), 404)


def test_links_and_pipes_in_the_folder_of_logs_are_not_followed(watched, folder, tmp_path):
    (tmp_path / "secret").write_text("secret\n")
    (folder.logs / "w1.log").symlink_to(tmp_path / "secret")
    os.mkfifo(folder.logs / "w2.log")
    for name in ("w1", "w2"):
        assert log_of(watched, folder, name) == []


# Actions


def test_actions_that_are_off_are_not_there(watched, folder):
    for api in (logs(watched, folder), Api(watched.store, watched.stream, actions=True)):
        refused(api.post(V1 + "actions/stop", JSON, b"{}"), 404)
    refused(logs(watched, folder).get(V1 + "actions/stop"), 404)
    assert folder.asked_stop() == 0


def test_a_worker_is_asked_to_leave_as_by_the_command(acting, folder):
    data = told(acting.post(V1 + "actions/drain", JSON, b'{"worker": "w3"}'), 202)
    assert data["id"] == "drain-w3"
    assert folder.take_asked() == {"drain-w3": ""}


@pytest.mark.parametrize(("body", "level"), [(b"", 1), (b"{}", 1), (b'{"how": "now"}', 2)])
def test_the_run_is_asked_to_stop_as_by_the_command(acting, folder, body, level):
    told(acting.post(V1 + "actions/stop", JSON, body), 202)
    assert folder.asked_stop() == level


@pytest.mark.parametrize(
    ("name", "headers", "body", "status"),
    [
        ("stop", {"X-DB-Token": "page"}, b"{}", 415),
        ("stop", {**JSON, "Content-Type": "text/plain"}, b"{}", 415),
        ("stop", {"Content-Type": "application/json"}, b"{}", 403),
        ("stop", {**JSON, "X-DB-Token": ""}, b"{}", 403),
        ("stop", JSON, b"[]", 400),
        ("stop", JSON, b"{", 400),
        ("stop", JSON, b"[" * 4000, 400),
        ("stop", JSON, b'{"how": "later"}', 400),
        ("stop", JSON, b'{"how": ["now"]}', 400),
        ("stop", JSON, b'{"odd": 1}', 400),
        ("drain", JSON, b"{}", 404),
        ("drain", JSON, b'{"worker": "../../stop"}', 404),
        ("drain", JSON, b'{"worker": ["w1"]}', 404),
        ("drain", JSON, b'{"worker": "w1", "odd": 1}', 400),
        ("odd", JSON, b"{}", 404),
        ("", JSON, b"{}", 404),
    ],
)
def test_an_action_that_is_not_right_does_nothing(acting, folder, name, headers, body, status):
    refused(acting.post(V1 + "actions/" + name, headers, body), status)
    assert folder.asked_stop() == 0
    assert folder.take_asked() == {}


def test_an_action_is_not_asked_for_by_get(acting):
    refused(acting.get(V1 + "actions/stop"), 405)


def test_a_folder_that_cannot_be_written_is_said_so(acting, folder):
    (folder.path / "asked").write_text("a file is in the way")
    refused(acting.post(V1 + "actions/drain", JSON, b'{"worker": "w3"}'), 500, "cannot be asked")


# Packing


def test_only_what_is_long_is_packed_and_only_for_those_who_take_it():
    long, short = Reply(200, b"x" * 5000), Reply(200, b"x" * 10)
    reply = packed(long, "br, gzip;q=0.5")
    assert gzip.decompress(reply.body) == long.body
    assert reply.headers["Content-Encoding"] == "gzip"
    for accept in ("", "br", "gzip;q=0", "identity"):
        assert packed(long, accept) is long
    assert packed(short, "gzip") is short
