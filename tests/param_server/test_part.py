"""Copy on pin: what a reader holds never changes, and nothing is copied when nobody reads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.part import VALUES, Applied, Part
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import SGD
from tests.param_server.jobs import LAYOUT, make_contract

MOMENTUM = SGD(momentum=0.9)


def make_part(index=0, **contract):
    contract.setdefault("rule", MOMENTUM)
    part = Part(LAYOUT.parts[index], make_contract(**contract))
    part.load_({VALUES: torch.ones(part.range.numel)})
    return part


def ones(part):
    return torch.ones(part.range.numel)


def pointers(part):
    return {name: tensor.data_ptr() for name, tensor in part.tensors.items()}


def test_a_push_is_applied_in_place_while_nobody_holds_the_part():
    part = make_part()
    before = pointers(part)
    for _ in range(5):
        part.apply_(ones(part), samples=1)
    assert pointers(part) == before
    assert (part.version, part.samples) == (5, 5)


def test_a_pinned_reader_sees_the_old_values_after_a_push():
    part = make_part()
    pin = part.pin()
    part.apply_(ones(part), samples=1)
    assert torch.equal(pin[VALUES], ones(part))
    assert torch.equal(part.values, ones(part) * 0.9)
    pin.release()


def test_two_readers_of_two_versions_each_keep_theirs():
    part = make_part(rule=SGD())
    held = []
    for _ in range(3):
        held.append(part.pin())
        part.apply_(ones(part), samples=1)
    assert [round(float(pin[VALUES][0]), 4) for pin in held] == [1.0, 0.9, 0.8]
    for pin in held:
        pin.release()


def test_two_pins_of_one_version_hold_until_the_last_is_released():
    part = make_part()
    first, second = part.pin(), part.pin()
    part.apply_(ones(part), samples=1)
    first.release()
    part.apply_(ones(part), samples=1)
    assert torch.equal(second[VALUES], ones(part))
    second.release()


def test_only_the_pinned_tensors_are_copied():
    part = make_part()
    before = pointers(part)
    pin = part.pin([VALUES])
    part.apply_(ones(part), samples=1)
    after = pointers(part)
    assert after["momentum"] == before["momentum"]
    assert after[VALUES] != before[VALUES]
    pin.release()


def test_a_released_current_tensor_is_written_in_place_again():
    part = make_part()
    before = pointers(part)
    part.pin().release()
    part.apply_(ones(part), samples=1)
    assert pointers(part) == before


def pool(part):
    """Buffers that nobody uses: they are one heap's, as values and state have one length."""
    return [tensor for free in part._heap._free.values() for tensor in free]


def test_buffers_come_back_and_nothing_new_is_allocated_in_steady_state():
    part = make_part()
    seen = set()
    for step in range(20):
        pin = part.pin([VALUES, "momentum"])
        part.apply_(ones(part), samples=1)
        pin.release()
        if step == 1:
            seen = {*pointers(part).values(), *(t.data_ptr() for t in pool(part))}
    assert {*pointers(part).values(), *(t.data_ptr() for t in pool(part))} == seen
    assert len(pool(part)) == 2


def test_releasing_twice_is_releasing_once():
    part = make_part()
    mine, other = part.pin(), part.pin()
    mine.release()
    mine.release()
    part.apply_(ones(part), samples=1)
    assert torch.equal(other[VALUES], ones(part))
    other.release()


@given(st.lists(st.sampled_from(["apply", "pin", "release"]), max_size=30))
def test_no_order_of_pins_and_pushes_changes_what_is_held_or_applied(script):
    part, plain = make_part(), make_part()
    held = []
    for word in script:
        if word == "apply":
            part.apply_(ones(part), samples=2)
            plain.apply_(ones(plain), samples=2)
        elif word == "pin":
            pin = part.pin([VALUES, "momentum"])
            held.append((pin, pin[VALUES].clone(), pin["momentum"].clone()))
        elif held:
            held.pop(len(held) // 2)[0].release()
        for pin, values, momentum in held:
            assert torch.equal(pin[VALUES], values)
            assert torch.equal(pin["momentum"], momentum)
    assert torch.equal(part.values, plain.values)
    assert torch.equal(part.tensors["momentum"], plain.tensors["momentum"])
    held_tensors = {t.data_ptr() for pin, _, _ in held for t in (pin[VALUES], pin["momentum"])}
    free = [t.data_ptr() for t in pool(part)]
    assert len(set(free)) == len(free)
    assert not set(free) & (held_tensors | set(pointers(part).values()))


def test_absent_tensors_keep_values_and_momentum_while_the_version_rises():
    part = make_part(index=2)  # w, b and v have 2, 7 and 50 elements here
    part.apply_(ones(part), samples=1)
    before = {name: tensor.clone() for name, tensor in part.tensors.items()}
    (mask,) = LAYOUT.absent_masks(["b"])[2:]
    part.apply_(ones(part), samples=1, absent=mask)
    for name, tensor in part.tensors.items():
        changed = tensor != before[name]
        assert not changed[2:9].any()
        assert changed[:2].all()
        assert changed[9:].all()
    assert part.version == 2


def test_a_push_without_any_tensor_only_raises_the_version():
    part = make_part()
    pin = part.pin()
    before = pointers(part)
    part.apply_(ones(part), samples=3, absent=b"\x01")
    assert pointers(part) == before
    assert (part.version, part.samples) == (1, 3)
    pin.release()


def test_a_mask_that_does_not_fit_changes_nothing():
    part = make_part()
    with pytest.raises(RemoteProtocolError):
        part.apply_(ones(part), samples=1, absent=b"\x02")
    assert torch.equal(part.values, ones(part))
    assert (part.version, part.samples) == (0, 0)


@pytest.mark.parametrize("limit", [0.01, 1.0, 7.9, 8.1, 100.0])
def test_clipping_a_part_equals_torchs_clip_grad_norm(limit):
    """Up to 1e-6 relative: torch rounds the scaled gradient's norm another way."""
    part = make_part(rule=SGD(), clip_part_norm=limit)
    grad = ones(part)  # norm 8
    parameter = torch.nn.Parameter(part.values.clone())
    parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_([parameter], limit)
    assert parameter.grad is not None
    part.apply_(grad, samples=1, norm=float(grad.norm()))
    torch.testing.assert_close(part.values, 1 - 0.1 * parameter.grad, rtol=1e-6, atol=0)
    assert torch.equal(grad, ones(part))


def test_the_schedule_counts_the_samples_of_the_part_itself():
    part = make_part(rule=SGD(), schedule=Schedule(kind="step", every=8, gamma=0.5))
    steps = []
    for _ in range(5):
        before = float(part.values[0])
        part.apply_(ones(part), samples=4)
        steps.append(round((before - float(part.values[0])) / 0.1, 4))
    assert steps == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_own_pushes_since_a_fetch_leave_out_the_refused_ones():
    row = Applied(inc=1)
    for seq, is_applied in ((1, True), (2, False), (3, True), (4, False)):
        row = row.after(seq, 0, is_applied=is_applied)
    assert [row.own_since(seq) for seq in range(5)] == [2, 1, 1, 0, 0]
    assert row.own_since(9) == 0


def test_a_table_row_remembers_a_bounded_number_of_refused_pushes():
    row = Applied(inc=1)
    for seq in range(1, 200):
        row = row.after(seq, 0, is_applied=False)
    assert len(row.refused) == 64
    assert row.own_since(199 - 64) == 0
