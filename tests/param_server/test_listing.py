"""What a depot holds: names, ages, who may write, and what may go. Pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.errors import SnapshotFenced
from distbelief.param_server.listing import Listing, age_of, claim_of, newest_first

snapshots = st.builds(
    lambda epoch, version, number: (
        f"e{epoch:06d}-v{version:012d}" + (f"-{number:06d}" if number else "")
    ),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 2),
)
files = st.lists(
    st.one_of(
        st.builds(
            lambda name, end: name + end, snapshots, st.sampled_from([".json", ".safetensors"])
        ),
        st.builds(claim_of, st.integers(1, 5)),
        st.sampled_from([".e000001.json.part", "README", "e1", "e000001-v1.json", ""]),
    ),
    max_size=24,
)


@pytest.mark.parametrize(
    ("name", "age"),
    [
        ("e000001-v000000000008", (1, 8, 0)),
        ("e000012-v000000000008-000003", (12, 8, 3)),
        ("e1000000-v1000000000000", (1_000_000, 1_000_000_000_000, 0)),
        ("e000001", None),
        ("e000001-v000000000008/..", None),
        ("../e000001-v000000000008", None),
        ("", None),
    ],
)
def test_the_age_of_a_snapshot_is_in_its_name(name, age):
    assert age_of(name) == age


def test_a_later_epoch_is_newer_whatever_its_version_and_however_long_its_number():
    names = [
        "e1000000-v000000000001",
        "e999999-v000000000009",
        "e000002-v000000000001",
        "e000001-v000000000009-000010",
        "e000001-v000000000009-000009",
        "e000001-v000000000009",
    ]
    assert newest_first(reversed(names)) == names


def test_a_snapshot_is_whole_with_both_of_its_files():
    listing = Listing.of(
        [
            "e000001-v000000000001.json",
            "e000001-v000000000001.safetensors",
            "e000001-v000000000002.safetensors",
            "e000001-v000000000003.json",
            "e000002",
        ]
    )
    assert listing.whole == ("e000001-v000000000001",)
    assert listing.torn == ("e000001-v000000000003", "e000001-v000000000002")
    assert listing.claims == {2}


@given(files)
def test_an_epoch_may_write_unless_a_later_one_has_left_anything(files):
    listing = Listing.of(files)
    later = [epoch for epoch in range(1, 6) if any(f.startswith(f"e{epoch:06d}") for f in files)]
    ours = [
        e
        for e in later
        if e in listing.claims
        or any((age_of(name) or (0,))[0] == e for name in (*listing.whole, *listing.torn))
    ]
    assert listing.epoch == max(ours, default=0)
    listing.check(listing.epoch, "here")
    if listing.epoch:
        with pytest.raises(SnapshotFenced, match=rf"epoch {listing.epoch}'s, this one is"):
            listing.check(listing.epoch - 1, "here")


@given(files, st.integers(1, 5), st.integers(2, 3))
def test_what_goes_is_never_a_later_epochs_nor_one_of_the_newest(files, epoch, keep):
    files = [*files, claim_of(epoch)]  # nobody removes anything before
    listing = Listing.of(files)
    gone = listing.surplus(epoch, keep)
    after = Listing.of([file for file in files if file not in gone])
    assert after.whole[:keep] == listing.whole[:keep]
    for file in gone:
        assert int(file[1:7]) <= epoch
    assert after.epoch == listing.epoch
    assert all(name not in after.whole for name in listing.torn)


@given(files, st.integers(1, 5), st.integers(2, 3), st.data())
def test_half_of_a_removal_leaves_nothing_that_looks_whole_and_is_not(files, epoch, keep, data):
    listing = Listing.of(files)
    gone = listing.surplus(epoch, keep)
    done = gone[: data.draw(st.integers(0, len(gone)))]
    after = Listing.of([file for file in files if file not in done])
    assert set(after.whole) <= set(listing.whole)
    assert after.whole[:keep] == listing.whole[:keep]
