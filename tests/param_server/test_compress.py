"""Compress: frames of each form, error feedback, what is refused, and what a peer may send."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.compress import (
    BLOCK,
    FORMS,
    Compression,
    Encoder,
    Scratch,
    decode_,
    encode_,
    frame_bytes,
)
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.layout import Run
from distbelief.param_server.protocol import as_frame
from distbelief.param_server.update import make_rule

LENGTHS = (1, 2, 63, 64, 255, 256, 257, 1000, 3 * BLOCK)
FED_BACK = ("int8", "topk")
TOP = 0.1

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9)
# A few numbers many times over: blocks are crossed, and an example is drawn in no time.
vectors = st.builds(
    lambda few, times: torch.tensor(few).repeat(times),
    st.lists(numbers, min_size=1, max_size=9),
    st.integers(1, 66),
)


def encoded(form, values, top=TOP):
    frame = torch.zeros(frame_bytes(form, values.numel(), top), dtype=torch.uint8)
    encode_(form, values, frame, Scratch(values.numel()))
    return frame


def decoded(form, frame, numel):
    into = torch.full((numel,), 7.0)
    decode_(form, as_frame(frame), into)
    return into


class Pushes:
    """One encoder, and the sum of what its frames brought."""

    def __init__(self, form, numel, top=TOP):
        self.form = form
        self.encoder = Encoder(form, numel, Scratch(numel), top)
        self.sent = torch.zeros(numel, dtype=torch.float64)
        self.given = torch.zeros(numel, dtype=torch.float64)

    @property
    def residual(self):
        assert self.encoder.residual is not None
        return self.encoder.residual

    def push(self, grad, present=None):
        frame = torch.zeros(self.encoder.frame_bytes, dtype=torch.uint8)
        self.encoder.encode_(grad, frame, present)
        values = decoded(self.form, frame, grad.numel())
        self.sent += values
        self.given += grad
        return values


# Frames


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numel", LENGTHS)
def test_a_frame_decodes_to_what_its_form_can_say(form, numel):
    values = torch.randn(numel) * torch.randn(numel).exp()
    got = decoded(form, encoded(form, values), numel)
    if form == "float32":
        assert torch.equal(got, values)
    elif form == "bfloat16":
        assert torch.equal(got, values.bfloat16().float())
    elif form == "int8":
        for block, of_block in zip(got.split(BLOCK), values.split(BLOCK), strict=True):
            scale = float(of_block.abs().max()) / 127
            assert float((block - of_block).abs().max()) <= 0.5001 * scale
    else:
        chosen = values.abs().topk(math.ceil(TOP * numel)).indices
        expected = torch.zeros(numel)
        expected[chosen] = values[chosen].bfloat16().float()
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("form", "numel", "top", "size"),
    [
        ("float32", 1000, TOP, 4000),
        ("bfloat16", 1000, TOP, 2000),
        ("int8", 256, TOP, 260),
        ("int8", 257, TOP, 265),
        ("topk", 1000, 0.01, 60),
        ("topk", 1001, 0.01, 66),
        ("topk", 3, 0.001, 6),
    ],
)
def test_the_length_of_a_frame_follows_from_form_and_part(form, numel, top, size):
    assert frame_bytes(form, numel, top) == size


@pytest.mark.parametrize(
    ("form", "frame"),
    [
        ("float32", "0000803f 00000000 000000c0 0000fe42"),
        ("bfloat16", "803f 0000 00c0 fe42"),
        ("int8", "0000803f 01 00 fe 7f"),
        ("topk", "02000000 03000000 00c0 fe42"),
    ],
)
def test_the_bytes_of_each_form_never_change(form, frame):
    """Another build of this package must be able to read them."""
    values = torch.tensor([1.0, 0.0, -2.0, 127.0])
    assert bytes(as_frame(encoded(form, values, top=0.5))) == bytes.fromhex(frame)


def test_int8_rounds_halves_to_even_and_reaches_both_ends():
    values = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5])
    got = decoded("int8", encoded("int8", values), 8)
    assert got.tolist() == [127, -127, 0, 2, 2, 0, -2, 126]


def test_each_block_of_int8_has_its_own_scale():
    values = torch.cat([torch.full((BLOCK,), 1e-6), torch.full((BLOCK,), 1e6), torch.zeros(9)])
    assert torch.allclose(decoded("int8", encoded("int8", values), len(values)), values, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-31, 1e-29, 1e18])
def test_int8_takes_very_small_and_very_large_blocks(magnitude):
    values = torch.full((10,), magnitude)
    error = (decoded("int8", encoded("int8", values), 10) - values).abs().max()
    assert float(error) <= max(1e-30, 1e-6 * magnitude)


def test_topk_takes_the_first_ones_of_equal_magnitudes():
    values = torch.tensor([1.0, -2.0, 2.0, 3.0, -2.0, 2.0, 0.0, 0.0])
    got = decoded("topk", encoded("topk", values, top=0.375), 8)
    assert got.tolist() == [0, -2, 2, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form):
    assert not decoded(form, encoded(form, torch.zeros(300)), 300).any()


@pytest.mark.parametrize("form", FORMS)
@given(values=vectors)
def test_encoding_changes_no_value_and_repeats_itself(form, values):
    before = values.clone()
    first = encoded(form, values)
    assert torch.equal(values, before)
    assert torch.equal(first, encoded(form, values))


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_can_be_decoded_wherever_it_lies(form):
    values = torch.randn(700)
    frame = bytes(as_frame(encoded(form, values)))
    expected = decoded(form, encoded(form, values), 700)
    for shift in range(9):
        place = bytearray(len(frame) + 16)
        place[shift : shift + len(frame)] = frame
        for view in (memoryview(place), memoryview(bytes(place)), memoryview(place).toreadonly()):
            into = torch.empty(700)
            decode_(form, view[shift : shift + len(frame)], into)
            assert torch.equal(into, expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_scratch_serves_parts_of_several_lengths(form):
    scratch = Scratch(1000)
    for numel in LENGTHS:
        values = torch.randn(numel)
        frame = torch.zeros(frame_bytes(form, numel, TOP), dtype=torch.uint8)
        encode_(form, values, frame, scratch)
        assert torch.equal(frame, encoded(form, values))


# Error feedback


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_forms_that_leave_nothing_out_keep_nothing(form):
    assert Encoder(form, 8, Scratch(8)).residual is None


def steps_of(elements):
    """Up to 9 gradients of 9 elements each."""
    return st.lists(st.lists(elements, min_size=9, max_size=9), min_size=1, max_size=9)


@given(steps_of(st.integers(-(2**15), 2**15)))
def test_topk_loses_nothing_exactly(steps):
    """Whole numbers below 2**24 are exact in float32, and so is what bfloat16 leaves of them."""
    pushes = Pushes("topk", 18)
    for step in steps:
        pushes.push(torch.tensor(step + step[::-1], dtype=torch.float32))
        assert torch.equal(pushes.sent + pushes.residual, pushes.given)


@given(steps_of(st.integers(-480, 480)))
def test_int8_loses_nothing_exactly(steps):
    """With 127 as the largest of each block its scale is 1, and every difference is exact."""
    pushes = Pushes("int8", 11)
    for step in steps:
        pushes.push(torch.tensor([127.0, *(k / 8 for k in step), -127.0]))
        assert torch.equal(pushes.sent + pushes.residual, pushes.given)
        assert float(pushes.residual.abs().max()) <= 0.5


@pytest.mark.parametrize("form", FED_BACK)
@given(steps_of(numbers))
def test_nothing_is_lost_but_for_the_rounding_of_the_sum(form, steps):
    pushes = Pushes(form, 300)
    most = 1e-30
    for step in steps:
        pushes.push(torch.tensor(step).repeat(34)[:300])
        most += max(map(abs, step))
    rest = pushes.sent + pushes.residual - pushes.given
    assert float(rest.abs().max()) <= 2**-22 * len(steps) * most


def test_what_is_left_out_is_sent_in_its_turn():
    pushes = Pushes("topk", 10)
    grad = torch.arange(1.0, 11.0)
    for _ in range(60):
        pushes.push(grad)
    assert bool((pushes.sent > 0).all())
    assert float(pushes.residual.max()) < 60  # about the sum of one gradient


def test_int8_does_not_starve_what_lies_beside_something_large():
    """Rounded by itself, 1 beside 1000 is 0 for ever; fed back, it arrives in steps of 1000/127."""
    grad = torch.tensor([1000.0, 1.0])
    assert decoded("int8", encoded("int8", grad), 2)[1] == 0
    pushes = Pushes("int8", 2)
    for _ in range(100):
        pushes.push(grad)
    assert abs(float(pushes.sent[1]) - 100) < 4


@pytest.mark.parametrize("form", FED_BACK)
def test_absent_tensors_send_nothing_and_their_residual_waits(form):
    pushes = Pushes(form, 600)
    pushes.push(torch.randn(600))
    waiting = pushes.residual.clone()
    present = (Run(0, 100, 0), Run(100, 150, 1), Run(400, 590, 0))
    grad = torch.zeros(600)
    for run in present:
        grad[run.start : run.stop] = torch.randn(run.stop - run.start)
    got = pushes.push(grad, present)
    for gap in (slice(150, 400), slice(590, 600)):
        assert not got[gap].any()
        assert torch.equal(pushes.residual[gap], waiting[gap])
    assert torch.allclose((pushes.sent + pushes.residual).float(), pushes.given.float())


@pytest.mark.parametrize("form", FED_BACK)
def test_a_step_without_any_gradient_sends_zeros(form):
    pushes = Pushes(form, 300)
    pushes.push(torch.randn(300))
    waiting = pushes.residual.clone()
    assert not pushes.push(torch.zeros(300), present=()).any()
    assert torch.equal(pushes.residual, waiting)


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_is_left_alone_when_the_next_one_is_encoded(form):
    encoder = Encoder(form, 300, Scratch(300), TOP)
    frames = [torch.zeros(encoder.frame_bytes, dtype=torch.uint8) for _ in range(2)]
    encoder.encode_(torch.randn(300), frames[0])
    sent = frames[0].clone()
    encoder.encode_(torch.randn(300), frames[1])
    assert torch.equal(frames[0], sent)
    assert not torch.equal(frames[0], frames[1])


# NaN and Inf


POISON = (math.nan, math.inf, -math.inf, 1e30, -1e30)


def gate(values):
    """What the shard asks of a gradient."""
    return math.isfinite(float(torch.dot(values, values)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", POISON)
@given(numel=st.sampled_from(LENGTHS), data=st.data())
def test_poison_comes_out_where_it_went_in(form, poison, numel, data):
    at = data.draw(st.integers(0, numel - 1))
    grad = torch.randn(numel)
    grad[at] = poison
    got = Pushes(form, numel).push(grad)
    assert not gate(got)
    if form in FED_BACK:
        assert not got.isfinite()[at]
        assert int((got != 0).sum()) == 1  # NaN differs from 0 too
        assert math.isnan(poison) == math.isnan(got[at])
    assert math.isnan(poison) or math.copysign(1, got[at]) == math.copysign(1, poison)


@pytest.mark.parametrize("form", FORMS)
def test_a_square_sum_that_overflows_does_so_on_the_other_side(form):
    assert not gate(Pushes(form, 300).push(torch.full((300,), -1.5e18)))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_poison_is_still_poison(form):
    for poison in POISON:
        assert not gate(Pushes(form, 300).push(torch.full((300,), poison)))


@pytest.mark.parametrize("form", FED_BACK)
@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_gradient_leaves_the_residual_alone(form, poison):
    pushes = Pushes(form, 300)
    pushes.push(torch.randn(300))
    waiting = pushes.residual.clone()
    grad = torch.randn(300)
    grad[123] = poison
    pushes.push(grad)
    assert torch.equal(pushes.residual, waiting)
    assert gate(pushes.push(torch.randn(300)))


# What a peer may send


def refuses(form, frame, numel):
    with pytest.raises(RemoteProtocolError):
        decode_(form, frame, torch.empty(numel))


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_of_another_length_is_refused(form):
    frame = bytes(as_frame(encoded(form, torch.randn(300))))
    for wrong in (b"", frame[:-1], frame + b"\0", frame * 20):
        refuses(form, wrong, 300)


@pytest.mark.parametrize("form", ["", "float16", "topk "])
def test_a_form_that_is_none_is_refused(form):
    refuses(form, b"\0" * 8, 2)


@pytest.mark.parametrize(
    "indices", [[-1, 3], [3, 8], [3, 2**31 - 1], [3, 3], [4, 3], [-(2**31), -1]]
)
def test_topk_indices_must_ascend_within_the_part(indices):
    frame = torch.tensor(indices, dtype=torch.int32).numpy().tobytes() + bytes(4)
    refuses("topk", frame, 8)


def test_topk_cannot_keep_more_than_the_part_has():
    frame = torch.arange(9, dtype=torch.int32).numpy().tobytes() + bytes(18)
    decode_("topk", frame, torch.empty(9))
    refuses("topk", frame, 8)


def test_an_int8_scale_below_0_is_refused():
    refuses("int8", torch.tensor([-1.0]).numpy().tobytes() + bytes(8), 8)


def check_hostile(form, frame, numel):
    """Only RemoteProtocolError comes out, or values of which the gate can judge."""
    into = torch.empty(numel)
    try:
        decode_(form, frame, into)
    except RemoteProtocolError:
        return
    gate(into)


@pytest.mark.parametrize("form", FORMS)
@given(numel=st.integers(1, 600), frame=st.binary(max_size=700))
def test_any_bytes_are_decoded_or_refused(form, numel, frame):
    check_hostile(form, frame, numel)


@pytest.mark.parametrize("form", FORMS)
@given(numel=st.integers(1, 600), data=st.data())
def test_any_bytes_of_the_right_length_are_decoded_or_refused(form, numel, data):
    size = frame_bytes(form, numel, TOP)
    check_hostile(form, data.draw(st.binary(min_size=size, max_size=size)), numel)


@pytest.mark.parametrize("form", FORMS)
@given(values=vectors, data=st.data())
def test_a_changed_byte_is_decoded_or_refused(form, values, data):
    frame = bytearray(as_frame(encoded(form, values)))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    check_hostile(form, frame, values.numel())


@given(st.lists(st.floats(width=32, min_value=0) | st.just(math.nan), min_size=3, max_size=3))
def test_a_code_of_0_is_0_whatever_the_scale(scales):
    codes = torch.arange(600).remainder(256).to(torch.int8)
    into = torch.empty(600)
    decode_("int8", torch.tensor(scales).numpy().tobytes() + codes.numpy().tobytes(), into)
    assert not into[codes == 0].any()


# What is refused


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adagrad"])
@pytest.mark.parametrize("push", FORMS)
@pytest.mark.parametrize("fetch", ["float32", "bfloat16", "int8"])
def test_all_other_forms_go_together(rule, push, fetch):
    Compression(push=push, fetch=fetch).check(make_rule(rule), 0.0)


def test_nothing_is_compressed_by_default():
    assert Compression() == Compression(push="float32", fetch="float32")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"push": "bf16"}, "push 'bf16' is none of float32, bfloat16, int8, topk"),
        ({"fetch": "fp32"}, "fetch 'fp32' is none of"),
        ({"fetch": "topk"}, "parameters are not sparse"),
        ({"push": "topk", "top": 0.0}, "top must be above 0"),
        ({"push": "topk", "top": 0.2}, "int8 is smaller"),
        ({"push": "topk", "top": math.nan}, "top must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Compression(**settings)


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_topk_is_refused_with_a_fading_memory_of_squares(rule):
    with pytest.raises(ValueError, match="squares"):
        Compression(push="topk").check(make_rule(rule), 0.0)
    Compression(push="int8").check(make_rule(rule), 0.0)


def test_topk_is_refused_with_clipping_on_the_shard():
    with pytest.raises(ValueError, match="clip_norm"):
        Compression(push="topk").check(make_rule("sgd"), 1.0)
    Compression(push="int8").check(make_rule("sgd"), 1.0)
