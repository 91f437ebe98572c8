"""doctor --cluster: what hosts say, judged; and probes that measure a way over the loopback."""

import socket
from typing import Any

import pytest

from distbelief.cluster.probe import Facts, Link, Probe
from distbelief.cluster.survey import Survey
from distbelief.doctor import BAD, OK, WARN
from distbelief.placement import Host

MINE = {"python": "3.11", "torch": "2.13.0"}
FACTS = Facts(at=0.0, versions=MINE, gpus=0, free=50 * 2**30)
LINK = Link(bytes_per_s=1e9, round_trip_s=0.0005)


def survey(**changes: Any) -> dict[str, tuple[str, str]]:
    """Of two hosts that are well, but for the changes: check -> its level and its text."""
    hosts = [
        Host(id="1", name="ps-1", address="10.0.0.1", cpus=4, tags=frozenset({"ps"})),
        Host(id="2", name="w-1", address="10.0.0.2", cpus=8, gpus=1, tags=frozenset({"worker"})),
    ]
    well: dict[str, Any] = {
        "hosts": hosts,
        "mine": MINE,
        "facts": {"1": FACTS, "2": Facts(at=0.0, versions=MINE, gpus=1, free=2**40)},
        "off_s": {"1": 0.01, "2": -0.03},
        "links": {("1", "2"): LINK, ("2", "1"): LINK},
        "store": "/mnt/runs",
    }
    checks = Survey(**{**well, **changes}).checks()
    for check in checks:
        assert bool(check.fix) == (check.level != OK), check
    return {check.name: (check.level, check.text) for check in checks}


def test_a_cluster_that_is_well_is_told_in_a_line_for_each_thing():
    assert survey() == {
        "hosts": (OK, "2, with 12 CPU and 1 GPU"),
        "roles": (OK, "ps: ps-1, worker: w-1"),
        "versions": (OK, "python 3.11, torch 2.13.0"),
        "clocks": (OK, "at most 30 ms apart from the one here"),
        "gpus": (OK, "1, as torch sees them"),
        "disks": (OK, "at least 50 GiB free"),
        "network": (OK, "2 ways: 8.00 Gbit/s to 8.00 Gbit/s, there and back in 0.5 to 0.5 ms"),
        "store": (OK, "/mnt/runs: all hosts write there and see each other's files"),
    }


OTHER = Facts(at=0.0, versions={"python": "3.12"}, gpus=None, free=2**29)


@pytest.mark.parametrize(
    ("changes", "name", "level", "text"),
    [
        ({"facts": {"1": FACTS, "2": "no distbelief"}}, "hosts", BAD, "w-1: no distbelief"),
        ({"facts": {"1": FACTS, "2": OTHER}}, "versions", BAD, "w-1 has torch missing"),
        ({"facts": {"1": FACTS, "2": OTHER}}, "gpus", BAD, "Ray counts 1, torch sees none"),
        ({"facts": {"1": FACTS, "2": FACTS}}, "gpus", BAD, "Ray counts 1, torch sees 0"),
        ({"facts": {"1": FACTS, "2": OTHER}}, "disks", WARN, "w-1 0.5 GiB"),
        ({"off_s": {"1": 0.0, "2": 90.0}}, "clocks", WARN, "w-1 +90.0 s"),
        ({"links": {("1", "2"): "timed out"}}, "network", BAD, "ps-1 to w-1: timed out"),
        (
            {"links": {("1", "2"): Link(bytes_per_s=1e7, round_trip_s=0.2), ("2", "1"): LINK}},
            "network",
            WARN,
            "slow are ps-1 to w-1: 0.08 Gbit/s, 200.0 ms",
        ),
        ({"store": ""}, "store", WARN, "save.store is not set"),
        ({"unstored": {"2": "denied"}}, "store", BAD, "cannot be used: w-1: denied"),
        ({"unseen": {"1": ["2"]}}, "store", BAD, "ps-1 does not see what w-1 wrote"),
        ({"hosts": [], "facts": {}, "off_s": {}, "links": {}}, "hosts", OK, "0, with 0 CPU"),
    ],
)
def test_what_is_wrong_is_named_with_its_host(changes, name, level, text):
    found = survey(**changes)
    assert found[name][0] == level
    assert text in found[name][1]


def test_hosts_of_one_role_alone_are_told():
    host = Host(id="1", name="ps-1", address="", cpus=4, tags=frozenset({"ps"}))
    assert survey(hosts=[host], facts={}, off_s={}, links={})["roles"] == (
        WARN,
        "ps: ps-1, worker: none",
    )


def test_a_way_is_measured_and_one_that_is_closed_says_why():
    probe = Probe()
    link = probe.reach("127.0.0.1", probe.listen("127.0.0.1"))
    assert isinstance(link, Link)
    assert link.bytes_per_s > 0
    assert 0 < link.round_trip_s < 5
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert probe.reach("127.0.0.1", port) == "Connection refused"


def test_a_store_is_written_read_and_left_as_it_was(tmp_path):
    probe = Probe()
    place = str(tmp_path / "store")
    assert [probe.store(place, "doctor-1", name) for name in ("a", "b")] == ["", ""]
    assert probe.stored(place, "doctor-1") == ["a", "b"]
    probe.clear(place, "doctor-1", ["a", "b"])
    assert list((tmp_path / "store").iterdir()) == []
    assert probe.store("/proc/none", "doctor-1", "a") != ""
    assert "No such file" in probe.stored(place, "doctor-1")
