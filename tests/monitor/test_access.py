import pytest

from distbelief.monitor.access import CSP, HEADERS, Access, Admit, Redirect, Refuse, is_loopback

SECRET = "s3cret"
ACCESS = Access(SECRET, "127.0.0.1", 8787, ["dash.example.org:443", "Tunnel"])


def judge(access=ACCESS, path="/", query="", method="GET", **headers):
    headers = {"Host": "127.0.0.1:8787"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return access.judge(method, path, query, headers)


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("127.0.0.1:8787", True),
        ("localhost:8787", True),
        ("LOCALHOST:8787", True),
        ("[::1]:8787", True),
        ("dash.example.org:443", True),
        ("dash.example.org:444", False),
        ("tunnel", True),
        ("tunnel:9000", True),
        ("localhost:9000", False),
        ("localhost", False),
        ("evil.example:8787", False),
        ("127.0.0.1.evil.example:8787", False),
        ("192.168.1.7:8787", False),
        ("127.0.0.1:8787@evil.example", False),
        ("localhost:8787 ", False),
        ("", False),
    ],
)
def test_only_our_own_names_are_served(host, is_known):
    verdict = judge(Host=host, X_DB_Token=SECRET)
    assert isinstance(verdict, Admit) is is_known
    if not is_known:
        assert isinstance(verdict, Refuse)
        assert verdict.status == 403


def test_on_all_addresses_any_number_is_ours_and_no_other_name():
    access = Access(SECRET, "0.0.0.0", 8787, ["node-7:8787"])
    for host in ("10.0.0.7:8787", "[fe80::1]:8787", "node-7:8787", "localhost:8787"):
        assert access.knows(host), host
    for host in ("10.0.0.7:80", "node-8:8787", "0.0.0.0.evil:8787"):
        assert not access.knows(host), host


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X_DB_Token": "wrong"},
        {"X_DB_Token": ""},
        {"X_DB_Token": SECRET + "x"},
        {"X_DB_Token": "s\udcff"},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": "Bearer"},
        {"Cookie": "distbelief-8787=wrong"},
        {"Cookie": f"distbelief-8788={SECRET}"},
        {"Cookie": f"other={SECRET}"},
        {"Cookie": "\x00=;;;==,"},
    ],
)
def test_without_the_secret_nobody_comes_in(headers):
    verdict = judge(**headers)
    assert isinstance(verdict, Refuse)
    assert verdict.status == 401
    assert SECRET not in verdict.message + verdict.hint


@pytest.mark.parametrize(
    "headers",
    [
        {"X_DB_Token": SECRET},
        {"Authorization": f"Bearer {SECRET}"},
        {"Cookie": f"a=b; distbelief-8787={SECRET}"},
    ],
)
def test_the_secret_is_taken_in_a_header_or_the_cookie(headers):
    assert judge(**headers) == Admit()


def test_the_link_brings_a_cookie_and_a_clean_address():
    verdict = judge(path="/a/page.html", query=f"x=1&k={SECRET}&y=%26")
    assert isinstance(verdict, Redirect)
    assert verdict.location == "./page.html?x=1&y=%26"
    name, *rest = verdict.cookie.split("; ")
    assert name == f"distbelief-8787={SECRET}"
    assert "HttpOnly" in rest
    assert "SameSite=Strict" in rest
    assert not any(one.startswith(("Path", "Domain")) for one in rest)


def test_a_wrong_link_brings_nothing():
    assert isinstance(judge(query="k=wrong"), Refuse)


def test_the_cookie_is_of_the_port_that_the_browser_sees():
    verdict = judge(query=f"k={SECRET}", Host="tunnel:9000")
    assert isinstance(verdict, Redirect)
    assert verdict.cookie.startswith("distbelief-9000=")
    cookie = f"distbelief-9000={SECRET}"
    assert judge(Host="tunnel:9000", Cookie=cookie) == Admit()
    assert isinstance(judge(Host="127.0.0.1:8787", Cookie=cookie), Refuse)


def test_another_site_cannot_post_even_with_the_cookie():
    cookie = f"distbelief-8787={SECRET}"
    for origin in ("http://evil.example", "null", "http://localhost:8787", "http://[x"):
        verdict = judge(method="POST", Cookie=cookie, Origin=origin)
        assert isinstance(verdict, Refuse), origin
        assert verdict.status == 403
    assert judge(method="POST", Cookie=cookie, Origin="http://127.0.0.1:8787") == Admit()


def test_probes_need_no_name_and_no_secret():
    for path in ("/healthz", "/readyz"):
        assert judge(path=path, Host="10.1.2.3") == Admit()
        assert isinstance(judge(path=path, Host="10.1.2.3", method="POST"), Refuse)


def test_without_a_secret_all_come_in_who_reach_the_loopback_by_its_name():
    access = Access("", "127.0.0.1", 8787)
    assert judge(access) == Admit()
    assert isinstance(judge(access, Host="evil.example:8787"), Refuse)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "node-7"])
def test_without_a_secret_no_other_address_is_served(host):
    with pytest.raises(ValueError, match="there must be a secret"):
        Access("", host, 8787)


def test_a_name_that_is_none_cannot_be_allowed():
    with pytest.raises(ValueError, match="is no name"):
        Access(SECRET, "127.0.0.1", 8787, ["http://x/"])


def test_what_is_loopback():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("127.9.9.9")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("localhost.example")


def test_answers_allow_nothing_but_our_own_files():
    allowed = dict(one.split(" ", 1) for one in CSP.split("; "))
    assert allowed["default-src"] == "'none'"
    assert allowed["script-src"] == allowed["style-src"] == allowed["connect-src"] == "'self'"
    assert allowed["worker-src"] == "'self'"
    assert allowed["frame-ancestors"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert "unsafe" not in CSP
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
    assert HEADERS["Referrer-Policy"] == "no-referrer"
    assert not any(name.lower().startswith("access-control") for name in HEADERS)
