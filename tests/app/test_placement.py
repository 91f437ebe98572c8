"""Placement: which host each process goes to, and what is said where there is no room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbelief.placement import Host, Need, Placement, shortage

CPU = {"worker": Need(cpus=1.0), "shard": Need(cpus=1.0)}
GPU = {"worker": Need(cpus=1.0, gpus=1.0), "shard": Need(cpus=1.0)}


def hosts(*some: Host) -> dict[str, Host]:
    return {host.id: host for host in some}


def host(name: str, cpus: float = 4.0, gpus: float = 0.0, tags: str = "", **more: bool) -> Host:
    return Host(
        id=name,
        name=name,
        address=f"10.0.0.{len(name)}",
        cpus=cpus,
        gpus=gpus,
        tags=frozenset(tags.split()),
        **more,
    )


def where(placement: Placement, role: str, number: int) -> list[str]:
    found = [placement.place(f"{role}{i}", role) for i in range(number)]
    return ["-" if one is None else one.id for one in found]


def test_shards_are_spread_over_hosts_by_their_cores():
    placement = Placement(CPU, hosts(host("a", 8), host("b", 4), host("c", 4)))
    assert sorted(where(placement, "shard", 4)) == ["a", "a", "b", "c"]


def test_the_launchers_host_is_taken_when_the_others_are_full():
    placement = Placement(CPU, hosts(host("head", 8, is_launcher=True), host("b", 2), host("c", 2)))
    assert where(placement, "shard", 2) == ["b", "c"]
    assert where(placement, "worker", 3) == ["b", "c", "head"]


def test_workers_go_where_the_most_cores_are_free():
    placement = Placement(CPU, hosts(host("a", 2), host("b", 4)))
    assert where(placement, "worker", 4) == ["b", "b", "a", "b"]


def test_workers_fill_one_gpu_host_after_another_and_shards_keep_away():
    placement = Placement(GPU, hosts(host("g1", 8, 2), host("g2", 8, 4), host("cpu", 4)))
    assert where(placement, "shard", 2) == ["cpu", "cpu"]
    assert where(placement, "worker", 7) == ["g1", "g1", "g2", "g2", "g2", "g2", "-"]


@pytest.mark.parametrize(
    ("share", "gpus", "room"), [(0.5, 2, 4), (0.25, 1, 4), (0.6, 2, 2), (2.0, 5, 2), (1 / 3, 1, 3)]
)
def test_a_share_is_of_one_gpu(share: float, gpus: float, room: int):
    needs = {"worker": Need(cpus=0.0, gpus=share), "shard": Need(cpus=0.0)}
    placement = Placement(needs, hosts(host("g", 1, gpus)))
    assert placement.room("worker") == room
    assert where(placement, "worker", room + 1)[-1] == "-"


def test_tagged_hosts_are_taken_where_there_are_any():
    needs = {"worker": Need(cpus=1.0, tag="worker"), "shard": Need(cpus=1.0, tag="ps")}
    tagged = hosts(host("p", 4, tags="ps"), host("w", 2, tags="worker other"), host("x", 64))
    placement = Placement(needs, tagged)
    assert where(placement, "shard", 2) == ["p", "p"]
    assert where(placement, "worker", 3) == ["w", "w", "-"]
    untagged = Placement(needs, hosts(host("x", 64)))
    assert where(untagged, "shard", 1) + where(untagged, "worker", 1) == ["x", "x"]


def test_a_process_that_must_stay_waits_for_its_own_host():
    placement = Placement(CPU, hosts(host("a"), host("b")))
    assert placement.place("shard0", "shard", only="gone") is None
    placement.hosts["gone"] = host("gone", 0)  # it is back, and full
    found = placement.place("shard0", "shard", only="gone")
    assert found is not None
    assert found.id == "gone"


def test_a_place_that_is_free_is_taken_again():
    placement = Placement(CPU, hosts(host("a", 1)))
    assert where(placement, "worker", 2) == ["a", "-"]
    placement.free("worker0")
    assert placement.room("worker") == 1
    assert where(placement, "worker", 1) == ["a"]
    assert placement.workers_at("a") == 1


def test_what_is_lacking_is_said_in_numbers():
    placement = Placement(GPU, hosts(host("a", 8, 1), host("b", 8, 1)))
    assert shortage(placement, 2, 2) == ""
    assert shortage(placement, 2, 4) == (
        "4 workers with 1 CPU and 1 GPU each need 4 GPU, the cluster has 2: room for 2"
    )
    few = Placement(CPU, hosts(host("a", 2), host("b", 1)))
    assert shortage(few, 2, 2) == (
        "2 workers with 1 CPU each need 2 CPU beside 2 shards, the cluster has 3 "
        "(a 2 CPU, b 1 CPU): room for 1"
    )
    assert shortage(few, 4, 1).startswith("4 shards with 1 CPU each need 4 CPU, the cluster has 3")
    assert few.places == {}


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.25, 0.6, 1.0, 2.0]),
    st.integers(0, 12),
    st.integers(0, 24),
)
def test_nobody_is_placed_where_there_is_no_room(sizes, share, shards, workers):
    needs = {"worker": Need(cpus=0.5, gpus=share), "shard": Need(cpus=1.0)}
    some = hosts(*(host(f"h{i}", c, g) for i, (c, g) in enumerate(sizes)))
    placement = Placement(needs, some)
    placed = where(placement, "shard", shards) + where(placement, "worker", workers)
    for name, one in some.items():
        number = placement.workers_at(name)
        assert 0.5 * number + placed[:shards].count(name) <= one.cpus + 1e-6
        if share:
            assert number <= (one.gpus // share if share >= 1 else one.gpus * (1 // share))
    assert ("-" in placed) == bool(shortage(Placement(needs, some), shards, workers))
