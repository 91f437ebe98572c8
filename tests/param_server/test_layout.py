"""How tensors lie in the vector, how it is cut, and which parameters have no place in it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.layout import (
    PART_MAX,
    Entry,
    Group,
    Layout,
    Run,
    layout_of,
    trainable,
)
from distbelief.param_server.partition import PARTS_MAX, Partition
from tests.param_server.jobs import LAYOUT, TWO_GROUPS, make_layout

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def layouts(draw):
    groups = draw(st.integers(1, 3))
    tensors = [
        (f"t{i}", shape, draw(st.integers(0, groups - 1)))
        for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=12)))
    ]
    tensors.append(("last", (draw(st.integers(1, 5000)),), 0))
    return make_layout(*tensors, groups=[Group(lr=0.1 * g) for g in range(groups)], part_max=128)


def test_tensors_lie_one_behind_the_other():
    assert [(e.name, e.offset, e.stop) for e in LAYOUT.entries] == [
        ("w", 0, 130),
        ("b", 130, 137),
        ("v", 137, 187),
    ]
    assert LAYOUT.total == 187


@given(layouts())
def test_parts_cover_the_vector_without_gap_or_overlap(layout):
    assert layout.parts[0].start == 0
    assert layout.parts[-1].stop == layout.total
    for before, after in zip(layout.parts, layout.parts[1:], strict=False):
        assert before.stop == after.start
        assert before.numel == layout.part_numel
    assert 0 < layout.parts[-1].numel <= layout.part_numel
    assert [part.index for part in layout.parts] == list(range(len(layout.parts)))


@pytest.mark.parametrize(
    ("total", "part_numel"),
    [
        (1, 64),
        (64, 64),
        (1024, 64),
        (1025, 128),
        (16 * 640, 640),
        (16 * 640 + 1, 704),
        (16 * PART_MAX, PART_MAX),
        (100 * PART_MAX, PART_MAX),
    ],
)
def test_a_part_is_a_sixteenth_rounded_up_to_64_and_at_most_part_max(total, part_numel):
    assert make_layout(("w", (total,), 0)).part_numel == part_numel


@given(layouts())
def test_runs_cover_each_part_and_name_the_group_of_each_tensor(layout):
    group_at = [e.group for e in layout.entries for _ in range(e.numel)]
    for part in layout.parts:
        at = 0
        for run in layout.runs(part.index):
            assert run.start == at
            at = run.stop
            assert set(group_at[part.start + run.start : part.start + run.stop]) == {run.group}
        assert at == part.numel


def test_a_tensor_is_cut_where_a_part_ends():
    assert LAYOUT.runs(0) == (Run(0, 64, 0),)
    assert LAYOUT.runs(2) == (Run(0, 2, 0), Run(2, 9, 0), Run(9, 59, 0))


@given(layouts(), st.data())
def test_absent_masks_say_exactly_which_elements_stay_as_they_are(layout, data):
    absent = {e.name for e in layout.entries if data.draw(st.booleans())}
    masks = layout.absent_masks(absent)
    updated = set()
    for part, mask in zip(layout.parts, masks, strict=True):
        for run in layout.present_runs(part.index, mask):
            updated |= set(range(part.start + run.start, part.start + run.stop))
    present = {i for e in layout.entries if e.name not in absent for i in range(e.offset, e.stop)}
    assert updated == present


def test_masks_are_empty_where_nothing_is_absent():
    assert LAYOUT.absent_masks([]) == (b"", b"", b"")
    assert LAYOUT.absent_masks(["b"]) == (b"", b"", b"\x02")


def test_neighbours_of_one_group_are_one_run_and_of_two_groups_are_not():
    assert LAYOUT.present_runs(2, b"") == (Run(0, 59, 0),)
    assert TWO_GROUPS.present_runs(2, b"") == (Run(0, 2, 0), Run(2, 9, 1), Run(9, 59, 0))
    assert LAYOUT.present_runs(2, b"\x02") == (Run(0, 2, 0), Run(9, 59, 0))


@pytest.mark.parametrize("mask", [b"\x00\x00", b"\x08", b"\xff"])
def test_a_mask_of_another_part_is_refused(mask):
    with pytest.raises(RemoteProtocolError, match="absent mask of part 2"):
        LAYOUT.present_runs(2, mask)


def test_an_element_has_the_name_of_its_tensor():
    assert LAYOUT.name_at(0) == "w[0]"
    assert LAYOUT.name_at(136) == "b[6]"
    with pytest.raises(ValueError, match="element 187 of a vector of 187"):
        LAYOUT.name_at(187)


@given(layouts())
def test_json_gives_back_an_equal_layout_with_an_equal_digest(layout):
    again = Layout.from_dict(json.loads(json.dumps(layout.as_dict())))
    assert again == layout
    assert again.digest == layout.digest
    assert layout.first_difference(again) is None


def test_equal_numbers_of_other_types_give_equal_digests():
    one, same = (
        make_layout(("w", (3,), 0), groups=[Group(lr=lr, weight_decay=decay)])
        for lr, decay in ((1, 0), (1.0, 0.0))
    )
    assert one == same
    assert one.digest == same.digest
    assert isinstance(Group(lr=torch.tensor(0.5).item()).lr, float)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_layout(("w", (10, 13), 0), ("b", (8,), 0), ("v", (50,), 0)), r"b \[7\] .*b \[8\]"),
        (make_layout(("w", (13, 10), 0), ("b", (7,), 0), ("v", (50,), 0)), r"w \[10, 13\]"),
        (make_layout(("w", (10, 13), 0), ("c", (7,), 0), ("v", (50,), 0)), r"b \[7\] .*c \[7\]"),
        (make_layout(("w", (10, 13), 0), ("b", (7,), 0)), r"v \[50\] .*only here"),
        (
            make_layout(*[(e.name, e.shape, 0) for e in LAYOUT.entries], ("x", (1,), 0)),
            "only there",
        ),
        (
            make_layout(*[(e.name, e.shape, 0) for e in LAYOUT.entries], groups=[Group(lr=0.2)]),
            r"lr=0\.1.*lr=0\.2",
        ),
        (make_layout(*[(e.name, e.shape, 0) for e in LAYOUT.entries], part_max=64), "part_max"),
    ],
    ids=["shape", "transposed", "name", "fewer", "more", "groups", "part_max"],
)
def test_the_first_differing_tensor_is_named(other, words):
    difference = LAYOUT.first_difference(other)
    assert difference is not None
    assert LAYOUT.digest != other.digest
    assert re.search(words, difference), difference


SAME_TENSORS = make_layout(
    ("w", (10, 13), 1), ("b", (7,), 0), ("v", (50,), 0), groups=[Group(lr=0.3), Group(lr=0.4)]
)


def test_groups_are_no_difference_of_tensors():
    """A run may go on with rates and decays of its own for some of them."""
    assert LAYOUT.first_tensor_difference(SAME_TENSORS) is None
    assert LAYOUT.first_difference(SAME_TENSORS) == (
        "w [10, 13] float32 at 0 (lr 0.1, weight_decay 0.0) here, "
        "w [10, 13] float32 at 0 (lr 0.4, weight_decay 0.0) there"
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_layout(("w", (10, 13), 0), ("b", (8,), 0), ("v", (50,), 0)), r"b \[7\] .*b \[8\]"),
        (make_layout(("w", (10, 13), 0), ("b", (7,), 0)), r"v \[50\] .*only here"),
        (replace(LAYOUT, part_max=64), "part_max 262144 here, 64 there"),
        (
            replace(
                LAYOUT, entries=(replace(LAYOUT.entries[0], dtype="float16"), *LAYOUT.entries[1:])
            ),
            "w .*float32 at 0.*float16",
        ),
    ],
    ids=["shape", "fewer", "part_max", "type"],
)
def test_other_tensors_are(other, words):
    difference = LAYOUT.first_tensor_difference(other)
    assert difference is not None
    assert re.search(words, difference), difference


@pytest.mark.parametrize(
    ("entries", "groups", "part_max", "words"),
    [
        ([], 1, PART_MAX, "no trainable parameter"),
        ([Entry(name="w", shape=(0,), dtype="float32", offset=0)], 1, PART_MAX, "no trainable"),
        ([Entry(name="w", shape=(3,), dtype="float32", offset=1)], 1, PART_MAX, "begins at 1"),
        ([Entry(name="w", shape=(3,), dtype="float32", offset=0, group=1)], 1, PART_MAX, "group 1"),
        ([Entry(name="w", shape=(3,), dtype="float32", offset=0)], 1, 100, "multiple of 64"),
        ([Entry(name="w", shape=(3,), dtype="float32", offset=0)], 1, 0, "multiple of 64"),
    ],
)
def test_an_impossible_layout_is_refused(entries, groups, part_max, words):
    with pytest.raises(ValueError, match=words):
        Layout(tuple(entries), (Group(lr=0.1),) * groups, part_max)


@pytest.mark.parametrize(
    "change",
    [
        {"entries": [["w", [3], "int64", 0]]},
        {"entries": [["w", [-3], "float32", 0]]},
        {"entries": [["w", [True], "float32", 0]]},
        {"entries": [["w", "3", "float32", 0]]},
        {"entries": [[3, [3], "float32", 0]]},
        {"entries": [["w", [3], "float32", 0.0]]},
        {"entries": [["w", [3], "float32", -1]]},
        {"entries": 3},
        {"groups": [{"lr": -1.0}]},
        {"groups": [{"lr": float("nan")}]},
        {"groups": [{"lr": 0.1, "odd": 1}]},
        {"groups": []},
        {"part_max": "64"},
        {"part_max": float("inf")},
        {"part_max": True},
    ],
    ids=str,
)
def test_json_that_is_no_layout_is_refused(change):
    with pytest.raises((ValueError, TypeError)):
        Layout.from_dict({**LAYOUT.as_dict(), **change})


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_group_takes_finite_factors_of_at_least_0(name, value):
    with pytest.raises(ValueError, match=name):
        Group(**{"lr": 0.1, name: value})


# From a module


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.b.bias.requires_grad_(False)


def test_tied_parameters_are_laid_out_once_and_frozen_ones_not_at_all():
    kept = trainable(Tied().named_parameters(remove_duplicate=False))
    assert [name for name, _ in kept] == ["a.weight", "a.bias"]


def test_a_layout_takes_shapes_types_and_groups_from_the_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(torch.bfloat16)
    named = trainable(model.named_parameters())
    layout = layout_of(named, [Group(lr=1), Group(lr=2)], {"1.bias": 1})
    assert [(e.name, e.shape, e.dtype, e.group) for e in layout.entries] == [
        ("0.weight", (2, 3), "bfloat16", 0),
        ("0.bias", (2,), "bfloat16", 0),
        ("1.weight", (1, 2), "bfloat16", 0),
        ("1.bias", (1,), "bfloat16", 1),
    ]


def lazy():
    return nn.LazyLinear(3)


def sparse():
    module = nn.Module()
    module.weight = nn.Parameter(torch.eye(3).to_sparse())
    return module


def complex_():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return module


def integer():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    return module


def shared():
    module = nn.Module()
    module.first = nn.Parameter(torch.zeros(3))
    module.weight = nn.Parameter(module.first.data)
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lazy, "weight is lazy"),
        (sparse, "weight .* sparse"),
        (complex_, "weight .* complex"),
        (integer, "weight .* int8"),
        (shared, "first and weight share their memory"),
    ],
)
def test_a_parameter_that_fits_no_float_vector_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        trainable(make().named_parameters())


# Partition


@given(layouts(), st.integers(1, 16))
def test_every_part_has_exactly_one_shard(layout, num_shards):
    if num_shards > len(layout.parts):
        with pytest.raises(ValueError, match=f"use at most {len(layout.parts)} shards"):
            Partition(layout, num_shards)
        return
    partition = Partition(layout, num_shards)
    hosted = [part for shard in range(num_shards) for part in partition.parts_of(shard)]
    assert hosted == list(layout.parts)
    sizes = [len(partition.parts_of(shard)) for shard in range(num_shards)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert all(
        partition.shard_of(p.index) == s for s in range(num_shards) for p in partition.parts_of(s)
    )


def test_a_job_without_shards_is_refused():
    with pytest.raises(ValueError, match="at least 1 shard"):
        Partition(LAYOUT, 0)


def test_more_parts_than_a_header_can_name_are_refused_without_making_them():
    layout = make_layout(("w", (2**62,), 0))
    with pytest.raises(ValueError, match=f"at most {PARTS_MAX}"):
        Partition(layout, 4)
