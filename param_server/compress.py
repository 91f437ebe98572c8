"""Compress: the forms in which the values of a part travel, and the memory of what they left out.

    frame of float32  = numel x float32                          the values themselves
    frame of bfloat16 = numel x bfloat16                         each rounded to nearest even
    frame of int8     = blocks x float32  scale                  blocks = numel / 256, rounded up
                        numel x int8      code                   value = code * scale of its block
    frame of topk     = kept x int32      index, ascending       kept >= 1
                        kept x bfloat16   value                  all other values are 0

Little endian, without gaps. Bytes of a frame, next to float32, and milliseconds for the 28 MB of
GoogLeNet in 16 parts, on one thread (`python tests/bench/compression.py --speed`):

                      float32   bfloat16    int8    topk 0.01   topk 0.001
    bytes an element        4          2   1.016         0.06        0.006
    smaller by              1          2     3.9           67          667
    encode a push         2.2        1.8      17           18           15
    encode a fetch        2.2        1.8       9
    decode                2.3        1.7     3.0          1.7          1.3

int8: the scale is the largest magnitude of the block / 127; codes are rounded to nearest even,
symmetric around 0, from -127 to 127. topk: the `top` * numel largest magnitudes, exactly; of equal
ones the first. Which form makes sense where, and why, is said by `Compression`.

**Error feedback** (`Encoder`; Seide et al. 2014, Stich et al. 2018). What int8 and topk leave out
of a push is kept by the worker and added to its next gradient, so nothing is lost, only late:
sent + residual = sum of the gradients, but for float32's rounding of that sum. For int8 it rarely
shows in the accuracy, but without it a coordinate 254 times smaller than its block's largest
would never be trained. Late is not free:

- A coordinate that topk sends seldom brings a sum of old gradients; the reported staleness counts
  the newest of them only. With momentum on the shard the total way is the same, lr / (1 -
  momentum) for each gradient, but it is gone in jumps (Lin et al. 2018, section 3.1, move the
  momentum into the worker for that reason; we do not).
- The local step of a worker (n_fetch above 1, or `latest`) takes its whole gradient at once.
- Weight decay is the shard's, on every coordinate of every push, whatever was sent.
- A worker that ends or dies takes its residual with it; a refused frame is gone, as a refused
  float32 gradient is. A new incarnation begins at 0.
- Tensors absent from a step send nothing, and their residual waits.

A fetch has no feedback and needs none: the shard's own values are never rounded, so that errors do
not add up, and what is smaller than a rounding step moves the worker's copy when it has grown.

**NaN and Inf.** bfloat16 keeps them. int8 and topk make a frame of nothing but them: bad
elements come out as what they were, and a magnitude whose square overflows float32 as Inf, all
others as 0. So the shard's gate (dot(g, g)) refuses it and names the element, and the residual
stays as it was before that gradient: one poisoned step does not poison the next.

Knows no messages, sockets or threads.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.layout import Run
from distbelief.param_server.update import Adam, Rule

FORMS = ("float32", "bfloat16", "int8", "topk")
FED_BACK = ("int8", "topk")
"""Forms of a push with error feedback."""

BLOCK = 256
"""Elements of int8 that share a scale: 1.6 % more bytes, and a reduction at the memory's speed."""

TOP_MAX = 0.16
"""Above a sixth int8 is smaller than topk (6 bytes an element kept), and sends every element."""

SQUARE_MAX = 1.8e19
"""Magnitudes from here on have no finite square in float32."""

MAGNITUDE_MIN = 1e-30
"""Blocks of far smaller magnitudes come out as 0: 127 / their largest would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """In which form a job's gradients (push) and parameters (fetch) travel between hosts."""

    push: str = "float32"
    """float32, bfloat16, int8 or topk."""
    fetch: str = "float32"
    """float32, bfloat16 or int8."""
    top: float = 0.01
    """Of push = topk: the part of the elements that is sent."""

    def __post_init__(self) -> None:
        for name in ("push", "fetch"):
            if getattr(self, name) not in FORMS:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(FORMS)}")
        if self.fetch == "topk":
            raise ValueError(
                "fetch cannot be topk: parameters are not sparse, and one that is not sent would "
                "not be unchanged but 0. Use bfloat16 or int8"
            )
        if not 0 < self.top <= TOP_MAX:
            raise ValueError(
                f"top must be above 0 and at most {TOP_MAX}, got {self.top}: an element that is "
                "kept takes 6 bytes, so that from there on int8 is smaller and leaves nothing out"
            )

    def check(self, rule: Rule, clip_part_norm: float) -> None:
        """See that this suits a job's update rule and the clipping done by its shards.

        Raises: ValueError with the reason.
        """
        if self.push != "topk":
            return
        if isinstance(rule, Adam):
            raise ValueError(
                "push cannot be topk with adam or adamw: they divide by a memory of squares that "
                "fades, and a coordinate that is sent seldom has a square that is too small before "
                "and too large after (Tang et al. 2021; on digits top-1 fell from 97 to 70 %). Use "
                "bfloat16 or int8, or another update rule"
            )
        if clip_part_norm:
            raise ValueError(
                "push cannot be topk with clip_part_norm: what a part is sent is not one gradient "
                "but sums of many, and what is clipped off them no error feedback brings back. "
                "Use clip_norm, which the worker does before"
            )


class Scratch:
    """Working memory for parts of up to `numel` elements: 13 bytes each. For one thread."""

    def __init__(self, numel: int) -> None:
        self.keys = np.empty(numel, np.int32)
        self.sorting = np.empty(numel, np.int32)
        self.mask = np.empty(numel, np.bool_)
        self.scaled = torch.empty(numel)
        self.factors = torch.empty(_blocks(numel))


class Encoder:
    """Turns one worker's gradients of one part into frames, with error feedback. For one thread.

    A frame is the caller's memory: an encoder writes it once and forgets it. So a push that is
    sent again is sent the same bytes, as long as the caller encodes the next one only when this
    one has been answered (depth 1), or into another frame.
    """

    def __init__(self, form: str, numel: int, scratch: Scratch, top: float = 0.01) -> None:
        """scratch: for at least `numel`; may be shared by encoders of one thread."""
        self.form = form
        self.frame_bytes = frame_bytes(form, numel, top)
        self.residual = torch.zeros(numel) if form in FED_BACK else None
        """1-D float32 [numel]: what was not sent yet. None where nothing is fed back."""
        self._scratch = scratch

    def encode_(self, grad: Tensor, frame: Tensor, present: Sequence[Run] | None = None) -> None:
        """Write the frame of a gradient and of what was left out before.

        grad: 1-D float32 [numel], read only. frame: uint8 [frame_bytes], beginning at a multiple
        of 8 bytes. present: runs that have a gradient, as `Layout.present_runs` gives, if not all
        do; elsewhere `grad` must be 0.
        """
        if self.residual is None or not _is_finite(grad):
            encode_(self.form, grad, frame, self._scratch)
            return
        self.residual.add_(grad)
        waiting = [] if present is None else list(_gaps(present, grad.numel()))
        kept = [self.residual[gap].clone() for gap in waiting]
        for gap in waiting:
            self.residual[gap] = 0
        _encode_(self.form, self.residual, frame, self._scratch, takes_sent=True)
        for gap, rest in zip(waiting, kept, strict=True):
            self.residual[gap] = rest


def _gaps(runs: Sequence[Run], numel: int) -> Iterator[slice]:
    """What lies between the runs, which are in order."""
    start = 0
    for run in (*runs, Run(numel, numel, 0)):
        if start < run.start:
            yield slice(start, run.start)
        start = run.stop


def frame_bytes(form: str, numel: int, top: float = 0.01) -> int:
    """Length of the frame of a part of `numel` elements, at least 1. top: see Compression."""
    assert numel >= 1
    if form == "topk":
        return 6 * max(1, math.ceil(top * numel))
    if form == "int8":
        return 4 * _blocks(numel) + numel
    return {"float32": 4, "bfloat16": 2}[form] * numel


def encode_(form: str, values: Tensor, frame: Tensor, scratch: Scratch) -> None:
    """Write values into a frame, without error feedback.

    values: 1-D float32 [numel], read only. frame: uint8 [frame_bytes], beginning at a multiple of
    8 bytes; its length says how many topk keeps. scratch: for at least numel.
    """
    if form == "float32":
        frame.view(torch.float32).copy_(values)
    elif form == "bfloat16":
        frame.view(torch.bfloat16).copy_(values)
    elif _is_finite(values):
        _encode_(form, values, frame, scratch)
    elif form == "int8":
        _encode_bad_int8_(_bad_only(values), frame)
    else:
        _encode_topk_(_bad_only(values), frame, scratch)


def _encode_(
    form: str, values: Tensor, frame: Tensor, scratch: Scratch, *, takes_sent: bool = False
) -> None:
    """takes_sent: what the frame decodes to is subtracted from `values`."""
    encode = _encode_int8_ if form == "int8" else _encode_topk_
    encode(values, frame, scratch, takes_sent=takes_sent)


def _is_finite(values: Tensor) -> bool:
    """The square sum is finite: what the shard's gate asks. One pass, 1 ms for 28 MB."""
    return math.isfinite(float(torch.dot(values, values)))


def decode_(form: str, frame: bytes | bytearray | memoryview, into: Tensor) -> None:
    """Read a frame that a peer has sent, whatever it holds.

    into: 1-D float32 [numel], the part's; NaN and Inf may come out, for the shard's gate to see.
    Without a copy of the frame where its memory is writable and aligned.
    Raises: RemoteProtocolError if it is no frame of this form and numel; `into` is undefined then.
    """
    numel, size = into.numel(), memoryview(frame).nbytes
    if form not in FORMS:
        raise RemoteProtocolError(f"a frame of form {form!r}, none of {', '.join(FORMS)}")
    if form == "topk":
        fits = size > 0 and size % 6 == 0 and size // 6 <= numel
    else:
        fits = size == frame_bytes(form, numel)
    if not fits:
        raise RemoteProtocolError(f"{size} bytes are no {form} of {numel} values")
    array = np.frombuffer(frame, np.uint8)
    # Small frames lie at odd addresses in libzmq's batch buffers; torch's kernels must not read
    # there, and torch warns of memory that it may not write.
    if array.ctypes.data % 8 or not array.flags.writeable:
        array = array.copy()
    _decode_(form, torch.from_numpy(array), into)


def _decode_(form: str, frame: Tensor, into: Tensor) -> None:
    """As `decode_`, of a frame of the right length."""
    if form == "float32":
        np.copyto(into.numpy(), frame.numpy().view(np.float32))  # why not copy_: slab.py
    elif form == "bfloat16":
        into.copy_(frame.view(torch.bfloat16))
    elif form == "int8":
        _decode_int8_(frame, into)
    else:
        _decode_topk_(frame, into)


# int8


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _split_int8(frame: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """Scales, float32 [blocks], and codes, int8 [numel]: views of a frame."""
    scales = 4 * _blocks(numel)
    return frame[:scales].view(torch.float32), frame[scales:].view(torch.int8)


def _cuts(numel: int) -> Iterator[tuple[slice, slice, int]]:
    """The whole blocks of a part, and its last one if that is shorter.

    Each as (its elements, its blocks, elements of a block).
    """
    whole = numel // BLOCK * BLOCK
    if whole:
        yield slice(0, whole), slice(0, whole // BLOCK), BLOCK
    if whole < numel:
        yield slice(whole, numel), slice(whole // BLOCK, None), numel - whole


def _encode_int8_(
    values: Tensor, frame: Tensor, scratch: Scratch, *, takes_sent: bool = False
) -> None:
    scales, codes = _split_int8(frame, values.numel())
    for at, blocks, length in _cuts(values.numel()):
        rows = values[at].view(-1, length)
        scale = scales[blocks].view(-1, 1)
        factor = scratch.factors[: len(rows)].view(-1, 1)
        scaled = scratch.scaled[: rows.numel()].view(-1, length)
        # Largest and smallest are two reads and no write: 2 ms for 28 MB, abs().amax() 5 ms.
        torch.amax(rows, 1, keepdim=True, out=scale)
        torch.amin(rows, 1, keepdim=True, out=factor)
        torch.maximum(scale, factor.neg_(), out=scale)
        torch.clamp(scale, min=MAGNITUDE_MIN, out=factor)
        torch.mul(factor.reciprocal_(), 127.0, out=factor)
        scale.div_(127.0)
        torch.mul(rows, factor, out=scaled)
        codes[at].view(-1, length).copy_(scaled.round_())
        if takes_sent:
            rows.sub_(scaled.mul_(scale))


def _encode_bad_int8_(bad: Tensor, frame: Tensor) -> None:
    """A bad block has the scale Inf or NaN, its bad elements the code 1 or -1, all others 0."""
    scales, codes = _split_int8(frame, bad.numel())
    for at, blocks, length in _cuts(bad.numel()):
        torch.amax(bad[at].abs().view(-1, length), 1, out=scales[blocks])
    codes.copy_(torch.where(bad < 0, -1, (bad != 0).int()))


def _decode_int8_(frame: Tensor, into: Tensor) -> None:
    scales, codes = _split_int8(frame, into.numel())
    if bool(scales.amin() < 0):
        raise RemoteProtocolError("an int8 frame with a scale below 0")
    for at, blocks, length in _cuts(into.numel()):
        rows = into[at].view(-1, length)
        # One multiplication of both types takes 5.6 ms for 28 MB, these two 2.5.
        rows.copy_(codes[at].view(-1, length)).mul_(scales[blocks].view(-1, 1))
    if not math.isfinite(float(scales.sum())):
        into[codes == 0] = 0  # 0 * Inf is not what was meant


# topk


def _split_topk(frame: Tensor) -> tuple[Tensor, Tensor]:
    """Indices, int32 [kept], and values, bfloat16 [kept]: views of a frame."""
    indices = frame.numel() // 6 * 4
    return frame[:indices].view(torch.int32), frame[indices:].view(torch.bfloat16)


def _encode_topk_(
    values: Tensor, frame: Tensor, scratch: Scratch, *, takes_sent: bool = False
) -> None:
    """Exactly the largest magnitudes.

    Magnitudes are compared as integers: the bits of a float without its sign rise with its
    magnitude (Inf above all numbers, NaN above Inf), and numpy partitions integers twice as
    fast: 4 ms for 28 MB, where torch.topk takes 67 ms.
    """
    numel = values.numel()
    indices, kept = _split_topk(frame)
    count = len(indices)
    keys, sorting, mask = (a[:numel] for a in (scratch.keys, scratch.sorting, scratch.mask))
    array = values.numpy()
    np.bitwise_and(array.view(np.int32), 0x7FFFFFFF, out=keys)
    np.copyto(sorting, keys)
    sorting.partition(numel - count)
    least = sorting[numel - count]
    np.greater_equal(keys, least, out=mask)
    chosen = np.flatnonzero(mask)
    if len(chosen) > count:  # the least one is there more than once: its first ones are taken
        equal = np.flatnonzero(keys[chosen] == least)
        chosen = np.delete(chosen, equal[count - len(chosen) :])
    indices.numpy()[:] = chosen
    kept.copy_(torch.from_numpy(array[chosen]))
    if takes_sent:
        array[chosen] -= kept.float().numpy()


def _decode_topk_(frame: Tensor, into: Tensor) -> None:
    indices, kept = _split_topk(frame)
    at = indices.numpy()
    if at[0] < 0 or at[-1] >= into.numel() or bool((at[1:] <= at[:-1]).any()):
        raise RemoteProtocolError("a topk frame whose indices do not ascend within the part")
    into.zero_()
    into.numpy()[at] = kept.float().numpy()


def _bad_only(values: Tensor) -> Tensor:
    """Inf, NaN and what has no finite square, as Inf, -Inf or NaN; all else as 0. Never all 0.

    values: their square sum is not finite. Allocates: this is the rare path.
    """
    magnitudes = values.abs()
    # Where no single square overflows their sum did: then the largest stands for it.
    limit = min(SQUARE_MAX, float(magnitudes.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return torch.where(magnitudes < limit, 0.0, values * math.inf)
