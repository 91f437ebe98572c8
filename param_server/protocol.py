"""Protocol: the messages between workers and shards, as frozen dataclasses, and their payloads.

One request has one reply. Both are one ZeroMQ message:

    message   = header payload*              header: see wire.py; v and op are on each
    hello     -> welcome | refused           payload: [contract JSON], or none to be told it
    init      -> ready   | refused           payload: one frame a part
    fetch     -> params  | refused           reply's payload: one frame a part
    push      -> ack     | refused           payload: one frame a part; the reply's with fetch=True
    merge     -> merged  | refused           payload both ways: [float32][int64]
    leave     -> left    | refused
    sync      -> synced  | refused
    query     -> report  | refused           reply's payload: [statistics JSON]

    frame of a part = its values in the form `dt` of the header (compress.py), in the order of the
                      header's `part` list; numel counts values, crc is of the frame's bytes

Between processes of one host the payload stays where it is. A hello names the worker's memory and
the welcome the shard's slab (memory.py, slab.py); `memory` is empty where there is none. A push
with dt `shared` has no payload: the gradient lies in the worker's memory, element 0 of the flat
vector at byte `place`. No checksum is made of what never leaves the host. The values are read
from the slab, so such a worker says fetch=False, and its fetch asks for no values.

Every request carries (run, w, inc, ep): the job, the worker, its incarnation and the epoch of
the shard it means. A push names all the parts it carries in one header, as columns: part[i] was
fetched at version base[i], when bseq[i] was the last of this worker's own pushes applied there;
its frame has numel[i] elements with checksum crc[i]; the tensors of mask absent[i] (see
Layout.absent_masks) have no gradient. `seq` is the worker's step number: the same for all parts
of a step, and 1, 2, 3 ... on each part. `samples` only counts: a push carries the sum over its
n_push steps of batch-mean gradients and is applied without rescaling.

A worker keeps its pushes until they are durable: in a snapshot on disk. Acks tell how far that is,
and `sync` asks, without a push. After a restart a shard goes on from its last snapshot, in a new
epoch; the welcome says what it still has of the worker's pushes, and the worker sends the others
again (backup.py). The hello says the first seq that it can still send: holes before that stay.

Welcome, params and ack tell a worker its `credits`: how many of its requests may be under way at
the same time. 0 says nothing new: what has no payload costs no memory.

An ack answers part by part with a word of STATUSES. Whatever the word, but for `gap` and
`conflict`, the part has consumed the seq, so nothing is ever sent again for it.

A `refused` speaks of the whole message, with a word of REFUSALS; nothing was changed.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distbelief.param_server import wire
from distbelief.param_server.compress import FORMS
from distbelief.param_server.place import NAME
from distbelief.param_server.wire import Message, encode

__all__ = ["Message", "encode"]  # what a user of this file needs of wire.py

MESSAGE_BYTES = 2 * 2**20
"""About what the parts of one message have: 4 MiB overlap less with the shard's work, 1 MiB cost
more."""

SHARED = "shared"
"""Instead of a form of compress.py: the values stay where they are, in shared memory."""

STATUSES = {
    "applied": "the part took the gradient and its version rose by one",
    "dup": "this seq was applied before; acknowledged again, not applied again",
    "nonfinite": "the gradient holds NaN or Inf, or its norm overflows; the part is unchanged",
    "norm": "the gradient's norm is above what the job allows; the part is unchanged",
    "numel": "the frame's length is not the part's; the part is unchanged",
    "form": "the frame is none of the form that its header names; the part is unchanged",
    "checksum": "the frame does not have the checksum of its header; the part is unchanged",
    "base": "the base version is one the part has not reached; the part is unchanged",
    "conflict": "this seq was used before with other content; the part is unchanged",
    "spent": "this seq was refused before and stays refused; the part is unchanged",
    "gap": "a push before this one is missing; the part is unchanged",
}

REFUSALS = {
    "junk": "not our protocol",
    "token": "wrong run or token",
    "key": "the connection was opened with the key of another process",
    "hello": "no hello on this connection",
    "version": "no protocol version in common",
    "contract": "another layout, rule or schedule than the job's",
    "not-ready": "the shard has no parameters yet",
    "ready": "the shard has its parameters already",
    "epoch": "the shard was restarted since the hello",
    "deposed": "a later epoch of this shard is known: this process is not the shard any more",
    "fenced": "a newer incarnation of this worker has said hello",
    "quarantine": "so many pushes of this worker were refused in a row that it must end",
    "part": "this shard does not host that part",
    "buffers": "buffers of another size than the contract's",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Who asks whom."""

    run: str
    w: str
    inc: int
    ep: int

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.run) or not NAME.fullmatch(self.w):
            raise ValueError(f"names must match {NAME.pattern}, got {self.run!r} and {self.w!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Request):
    """Opens a connection. `ep`: the latest epoch of the shard that the worker has seen, 0 for none.

    lo, hi: versions spoken.
    """

    op: ClassVar[str] = "hello"
    token: str = field(repr=False)
    lo: int = wire.VERSION
    hi: int = wire.VERSION
    memory: str = ""
    """Address of the worker's memory."""
    first: int = 0
    """Smallest seq that the worker can still send; 0 for one that pushes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The shard's parts, at which versions they are, and the last own seq applied to each."""

    op: ClassVar[str] = "welcome"
    shard: int
    shards: int
    ep: int
    is_ready: bool
    part: tuple[int, ...]
    version: tuple[int, ...]
    samples: tuple[int, ...]
    bseq: tuple[int, ...]
    restored: tuple[int, ...]
    """Versions at which the parts began this epoch."""
    memory: str = ""
    """Address of the shard's slab; empty too where the worker's memory does not open here."""
    credits: int = 0

    def __post_init__(self) -> None:
        _check_columns(self.part, self.version, self.samples, self.bseq, self.restored)


@dataclass(frozen=True, slots=True, kw_only=True)
class Init(Request):
    """First values of the parts, from the worker that begins the job."""

    op: ClassVar[str] = "init"
    part: tuple[int, ...]
    numel: tuple[int, ...]
    crc: tuple[int, ...]

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        _check_columns(self.part, self.numel, self.crc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    op: ClassVar[str] = "ready"
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch(Request):
    op: ClassVar[str] = "fetch"
    part: tuple[int, ...]
    values: bool = True
    """False: answer without payload; the asker reads the values from the slab."""
    back: str = "float32"
    """Form of the values in the answer."""
    average: bool = False
    """Answer with the averages (average.py) instead; `version` in the answer is then the number of
    updates that are in them, 0 where the values stand for an average that has not begun."""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        _check_columns(self.part)
        _check_form(self.back)
        if self.average and not (self.values and self.back == "float32"):
            raise ValueError("an average is answered as float32 values")


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Values of parts, each at its own version; parts of one message may differ in version.

    numel is empty where no values were asked for; it needs no credits then.
    """

    op: ClassVar[str] = "params"
    ep: int
    part: tuple[int, ...]
    version: tuple[int, ...]
    samples: tuple[int, ...]
    bseq: tuple[int, ...]
    numel: tuple[int, ...]
    credits: int = 0

    def __post_init__(self) -> None:
        numel = self.numel or self.part
        _check_columns(self.part, self.version, self.samples, self.bseq, numel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push(Request):
    """Gradients of one step. See the top of this file for the columns."""

    op: ClassVar[str] = "push"
    seq: int
    samples: int
    dt: str
    fetch: bool
    """Answer with the fresh parts in the same round trip."""
    part: tuple[int, ...]
    base: tuple[int, ...]
    bseq: tuple[int, ...]
    numel: tuple[int, ...]
    """Empty with dt `shared`."""
    crc: tuple[int, ...]
    """Empty where the push does not leave its host."""
    absent: tuple[bytes, ...]
    """Empty where no tensor of any part is absent."""
    place: int = 0
    """With dt `shared` alone."""
    back: str = "float32"
    """Form of the values in the ack."""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        part = self.part
        _check_columns(part, self.base, self.bseq, self.absent or part)
        if self.dt == SHARED:
            if self.numel or self.crc or self.fetch:
                raise ValueError("a push in shared memory has no payload, in neither direction")
        else:
            _check_form(self.dt)
            _check_columns(part, self.numel, self.crc or part)
            if self.place:
                raise ValueError(f"a place is of dt {SHARED}")
        _check_form(self.back)
        if self.seq < 1:
            raise ValueError("seq counts from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What became of each part of a push; columns as in push, numel is empty without payload."""

    op: ClassVar[str] = "ack"
    ep: int
    seq: int
    part: tuple[int, ...]
    status: tuple[str, ...]
    text: tuple[str, ...]
    """Why parts were refused; empty where none was."""
    version: tuple[int, ...]
    samples: tuple[int, ...]
    bseq: tuple[int, ...]
    """Last own push that the parts have in them; not `seq` where that was answered before."""
    staleness: tuple[int, ...]
    durable: tuple[int, ...]
    """Own seq that a snapshot on disk holds, per part."""
    numel: tuple[int, ...]
    credits: int = 0

    def __post_init__(self) -> None:
        _check_columns(
            self.part,
            self.status,
            self.text or self.part,
            self.version,
            self.samples,
            self.bseq,
            self.staleness,
            self.durable,
            self.numel or self.part,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge(Request):
    """A worker's buffers, and how many samples it saw since its last merge."""

    op: ClassVar[str] = "merge"
    samples: int
    floats: int
    integers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The merged buffers; both counts are 0 while nobody has contributed."""

    op: ClassVar[str] = "merged"
    ep: int
    floats: int
    integers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Request):
    op: ClassVar[str] = "leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    op: ClassVar[str] = "left"
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync(Request):
    """Asks what is durable."""

    op: ClassVar[str] = "sync"
    wants: bool
    """Somebody waits for it: take a snapshot as soon as may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synced:
    op: ClassVar[str] = "synced"
    ep: int
    part: tuple[int, ...]
    durable: tuple[int, ...]
    """Own seq that a snapshot on disk holds, per part."""
    is_saved: bool
    """There is a snapshot, so the parts have their first values for good."""
    is_stalled: bool
    """The last snapshot could not be written."""

    def __post_init__(self) -> None:
        _check_columns(self.part, self.durable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query(Request):
    """Asks for the shard's statistics."""

    op: ClassVar[str] = "query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    op: ClassVar[str] = "report"
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The whole message was refused; nothing was changed."""

    op: ClassVar[str] = "refused"
    code: str
    text: str


AnyRequest = Hello | Init | Fetch | Push | Merge | Leave | Sync | Query
AnyReply = Welcome | Ready | Params | Ack | Merged | Left | Synced | Report | Refusal

REQUESTS = wire.Codec(Hello, Init, Fetch, Push, Merge, Leave, Sync, Query)
REPLIES = wire.Codec(Welcome, Ready, Params, Ack, Merged, Left, Synced, Report, Refusal)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form {form!r}, this version takes {', '.join(FORMS)}")


def _check_columns(part: tuple[int, ...], *columns: tuple[object, ...]) -> None:
    """At least one part, none twice, and a value for each in every column."""
    if not part:
        raise ValueError("no part is named")
    if len(set(part)) != len(part):
        raise ValueError("a part is named twice")
    if any(len(column) != len(part) for column in columns):
        raise ValueError(f"{len(part)} parts need columns of that length")


def checksum(values: Tensor) -> int:
    """32-bit checksum of the bytes of a 1-D tensor: the wrapping sum of its 64-bit words, hashed.

    One pass at the memory's speed (1.0 ms for 28 MB where zlib's crc32 takes 7.9 ms); the sum is
    of integers, so it comes out the same everywhere and tells a push from another with the same
    seq. It finds any single changed bit, and other damage but for about once in 2**32. It is no
    defence against an enemy, and does not see words exchanged.
    """
    words = values.numpy().view(np.uint8)
    even = words.size // 8 * 8
    total = int(np.add.reduce(words[:even].view(np.uint64), dtype=np.uint64)) if even else 0
    total += int.from_bytes(words[even:].tobytes(), "little")
    # Fibonacci hashing. Folding the halves by xor would cancel them where elements come in equal
    # pairs: 64 times 1.0 and 64 times 1.5 gave the same checksum.
    return (total * 0x9E3779B97F4A7C15 & 2**64 - 1) >> 32


def as_bytes(frame: "bytes | bytearray | memoryview") -> Tensor:
    """A frame as uint8, to be read only."""
    array = np.frombuffer(frame, np.uint8)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_tensor(frame: "bytes | bytearray | memoryview") -> Tensor | None:
    """A frame as 1-D float32, without a copy where its memory is aligned; None if it cannot be.

    The tensor keeps the frame's memory alive. Frames under 8 KiB lie at odd addresses in
    libzmq's batch buffers (seen), where torch's kernels must not read: those are copied.
    """
    view = memoryview(frame)
    if view.nbytes % 4:
        return None
    if view.nbytes == 0:
        return torch.empty(0)
    array = np.frombuffer(view, dtype=np.float32)
    if array.ctypes.data % 8 or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def as_frame(values: Tensor) -> memoryview:
    """The memory of a contiguous 1-D CPU tensor as a frame; the tensor must outlive its use."""
    return values.numpy().data.cast("B")
