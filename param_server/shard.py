"""Shard: the state machine of the parameter server. No socket, no thread, no clock, no file.

`handle` takes one message of one peer and gives the one reply to it. Rule one: everything that
decides what becomes of a push lives in this file and in part.py.

The rules of a push, in this order:
1. Whole message, refused without change: another's key (`key`), unknown peer (`hello`), older
   incarnation (`fenced`), other epoch (`epoch`), no parameters yet (`not-ready`), foreign part
   (`part`), wrong number of frames (`junk`).
2. Part by part: a seq at or below the last one is a repetition: acknowledged again and not
   applied (`dup`), unless it was refused the first time (`spent`) or its content differs from
   what was last applied under that seq (`conflict`); a seq further than one ahead is a hole
   (`gap`). None of these consumes the seq.
3. From here on the seq is consumed, whatever happens, or one bad push would block its worker
   for ever: wrong length (`numel`), damaged (`checksum`), fetched from the future (`base`),
   NaN, Inf or overflowing norm (`nonfinite`), a norm that guard.py does not allow (`norm`): the
   part is unchanged.
4. Applied: values, state, version, samples and table change together.

What is unlovely: parts of one push may meet different fates. The step then counts as partial,
and the ack says so part by part; hiding it would not be honest.
"""

import hmac
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from distbelief.param_server import wire
from distbelief.param_server.average import SLOT
from distbelief.param_server.buffers import BufferMerge
from distbelief.param_server.compress import decode_
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.frames import Frames
from distbelief.param_server.guard import CHECK_EVERY, Guard, GuardConfig
from distbelief.param_server.image import PartImage, ShardImage
from distbelief.param_server.layout import PartRange
from distbelief.param_server.part import VALUES, Applied, Heap, Home, Part, Scratch, row_of
from distbelief.param_server.partition import Partition
from distbelief.param_server.protocol import (
    MESSAGE_BYTES,
    SHARED,
    Ack,
    AnyReply,
    AnyRequest,
    Fetch,
    Hello,
    Init,
    Leave,
    Left,
    Merge,
    Merged,
    Params,
    Push,
    Query,
    Ready,
    Refusal,
    Report,
    Sync,
    Synced,
    Welcome,
    as_bytes,
    as_frame,
    as_tensor,
    checksum,
)
from distbelief.param_server.staleness import Staleness

CREDITS_MAX = 32
"""Messages that one worker may have under way at most."""

SESSIONS_MAX = 65_536
"""Connections remembered; the oldest is forgotten first and has to say hello again."""

TEXTS_MAX = 2048
"""Characters for the reasons of one ack: it has to fit into a header whatever happened."""

Frame = bytes | memoryview
Payload = Sequence[Frame] | Sequence[Tensor]
"""Frames of a message; tensors, one a part, where a push lies in shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """Which shard of which job this is."""

    run: str
    """Id of the job; every message names it."""
    token: str = field(repr=False)
    """Secret of the job; every hello must show it."""
    index: int = 0
    num_shards: int = 1
    num_workers: int = 1
    """Workers the job was started with; the law of mean staleness needs it."""
    epoch: int = 1
    """How often this shard was started, from 1; never reused."""
    budget: int = 16 * 2**20
    """Bytes of pushes and parameters under way over the network, for all workers together. Each may
    have one message under way, whatever the budget."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Which pushes are refused although they fit."""


class Held(Protocol):
    """What a reply's payload points to."""

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `pins` hold what the payload points to: release them when it has been sent."""

    message: AnyReply
    payload: tuple[Frame, ...] = ()
    pins: tuple[Held, ...] = ()

    def release(self) -> None:
        for pin in self.pins:
            pin.release()


class _Fate(NamedTuple):
    """What became of a part's push: a word of STATUSES, and why."""

    word: str
    why: str = ""


_GOOD = _Fate("applied")
_NOT_SPENT = ("dup", "spent", "gap", "conflict")
"""Words after which the seq is not consumed by this message."""


@dataclass(frozen=True, slots=True)
class Application:
    """One applied push to one part, as an observer sees it."""

    part: int
    version: int
    w: str
    inc: int
    seq: int
    staleness: int
    samples: int
    crc: int


class Shard:
    """Owns some parts. See the top of this file."""

    def __init__(
        self,
        config: ShardConfig,
        image: ShardImage | None = None,
        on_apply: Callable[[Application], None] | None = None,
        on_push: Callable[[Push, Ack], None] | None = None,
        make_home: Callable[[Sequence[PartRange]], Home] | None = None,
    ) -> None:
        """image: what to go on from; config.epoch must then be above the image's.

        on_apply: called with each part that took a push. on_push: with every push and its ack,
        before that is sent.
        make_home: called once the parts are known; gives where their values live.

        Raises: ValueError if the image is of another shard or a later epoch.
        """
        self.config = config
        self.contract: Contract | None = None
        self.parts: dict[int, Part] = {}
        self.staleness = Staleness()
        self.counts: Counter[str] = Counter()
        """Pushed parts by what became of them, and refused messages by code."""
        self.is_deposed = False
        """A later epoch of this shard was heard of: it must answer nobody and save nothing."""
        self.is_stalled = True
        """Nobody writes snapshots, or the last one failed; set by who writes them."""
        self.is_waited_for = False
        """Somebody waits for a snapshot; taken back by who writes them."""
        self.is_saved = image is not None
        """There is a snapshot."""
        self.spoiled = ""
        """Which value is not finite any more, and by whose push; empty while all are. Such a shard
        must save nothing: its last snapshot is what there is."""
        self.num_changes = 0
        """Rises with whatever a snapshot would hold."""
        self._guard = Guard(config.guard)
        self._buffers = BufferMerge()
        self._incarnations: dict[str, int] = {}
        self._sessions: dict[bytes, tuple[str, int]] = {}
        self._heard: dict[str, float] = {}
        self._has_left: set[str] = set()
        self._decoded = Scratch()
        self._frames = Frames(1)
        self._message_bytes = MESSAGE_BYTES
        """Of the longest message of a client, uncompressed."""
        self._restored: dict[int, int] = {}
        """By part, the version at which this epoch began."""
        self._on_apply = on_apply
        self._on_push = on_push
        self._make_home = make_home
        if image is not None:
            self._restore(image)

    def __repr__(self) -> str:
        return (
            f"<Shard {self.config.index}/{self.config.num_shards} epoch {self.config.epoch} "
            f"[parts: {len(self.parts)}, version: {self.version}, "
            f"workers: {len(self._incarnations)}]>"
        )

    @property
    def is_ready(self) -> bool:
        return bool(self.parts) and all(part.is_ready for part in self.parts.values())

    @property
    def version(self) -> int:
        """Version of the part that is furthest behind."""
        return min((part.version for part in self.parts.values()), default=0)

    def handle(
        self,
        peer: bytes,
        message: AnyRequest,
        payload: Payload,
        now: float,
        speaker: str | None = None,
    ) -> Reply:
        """Take one message and give the reply to it.

        peer: the connection it came from. speaker: whose key it was sent with; None where there
        are no keys. payload: read only, and not kept after the call; of a
        push in shared memory the gradients of its parts, as tensors.
        now: seconds on any monotonic clock; only reported, it decides nothing.
        """
        refusal = self._turn_away(peer, message, speaker)
        if refusal is None:
            if not isinstance(message, Hello):  # a hello has yet to show the token
                self._heard[message.w] = now
            reply = self._answer(peer, message, payload)
            if not isinstance(reply, Refusal):
                self._heard[message.w] = now
                return reply
            refusal = reply
        self.counts[refusal.code] += 1
        return Reply(Refusal(code=refusal.code, text=wire.sayable(refusal.text)))

    def image(self) -> ShardImage:
        """Pin everything as it is now."""
        assert self.contract is not None
        assert self.is_ready, "nothing to save yet"
        names = (VALUES, *self.contract.slots)
        pins = {index: part.pin(names) for index, part in self.parts.items()}
        return ShardImage(
            run=self.config.run,
            index=self.config.index,
            num_shards=self.config.num_shards,
            epoch=self.config.epoch,
            contract=self.contract,
            parts=tuple(
                [
                    PartImage(
                        index,
                        part.version,
                        part.samples,
                        dict(part.table),
                        {name: pins[index][name] for name in names},
                        dict(part.owed),
                        part.lost,
                        part.averaged,
                    )
                    for index, part in self.parts.items()
                ]
            ),
            staleness=Staleness.merged([self.staleness]),
            buffers=dict(self._buffers.contributions),
            incarnations=dict(self._incarnations),
            pins=tuple(pins.values()),
        )

    def check_values(self, by: str = "") -> bool:
        """See whether every value and all state is finite; if not, `spoiled` says which is not.

        by: whose push was applied last, for the text.
        """
        return all([self._check_part(part, by) for part in self.parts.values()])

    def mark_durable(self, image: ShardImage) -> None:
        """The image is on disk for good: tell it in every ack from now on."""
        self.is_saved = True
        for part in image.parts:
            self.parts[part.index].durable = dict(part.table)

    def mark_undurable(self) -> None:
        """What this epoch began with is not where it must be to be durable."""
        self.is_saved = False
        for part in self.parts.values():
            part.durable = {}

    @property
    def num_workers(self) -> int:
        """Workers that have said hello and have not left."""
        return len(self._incarnations) - len(self._has_left)

    @property
    def num_undurable(self) -> int:
        """Pushes of the worker that has most of them that are in no snapshot.

        Of the first part: a worker's pushes are of all parts.
        """
        for part in self.parts.values():
            rows, durable = part.table.items(), part.durable
            return max((row.seq - row_of(durable, w, row.inc).seq for w, row in rows), default=0)
        return 0

    @property
    def lost_double_fault(self) -> int:
        """Parts of acknowledged pushes that are gone, or will be if nobody sends them again."""
        return sum(part.lost + sum(map(part.num_owed, part.owed)) for part in self.parts.values())

    def allowance(self, peer: bytes) -> int:
        """Bytes that a connection may have on their way here; 0 if nobody said hello on it."""
        if peer not in self._sessions or self.contract is None:
            return 0
        whole = 4 * sum(part.range.numel for part in self.parts.values())  # of an init
        buffers = 4 * self.contract.buffers.num_floats + 8 * self.contract.buffers.num_integers
        return max(self.config.budget, whole) + self._message_bytes + buffers

    @property
    def share_bytes(self) -> int:
        """What a worker that has used all its credits has under way."""
        return self._credits() * self._message_bytes

    def remember(self, w: str, inc: int, seq: int, parts: Sequence[int]) -> None:
        """A push was acknowledged in an earlier epoch, as its ledger says; see `Part.owe`."""
        for index in parts:
            self.parts[index].owe(w, inc, seq)

    def fence(self, w: str, inc: int) -> list[tuple[int, int]]:
        """Take nothing more of a worker's process up to this incarnation: it is gone.

        Returns: for each part, samples of that incarnation's pushes, and how many of them were
        refused. They change no more, unless a restart of this shard undoes some.
        """
        if self._incarnations.get(w, 0) <= inc:
            self._incarnations[w] = inc + 1
            self.num_changes += 1
        rows = [row_of(part.table, w, inc) for part in self.parts.values()]
        return [(row.samples, row.refused_samples) for row in rows]

    def stats(self) -> dict[str, object]:
        """What has happened so far, as JSON."""
        parts = self.parts.values()
        return {
            "shard": self.config.index,
            "epoch": self.config.epoch,
            "is_ready": self.is_ready,
            "version": [part.version for part in parts],
            "samples": [part.samples for part in parts],
            "counts": dict(self.counts),
            "lost_double_fault": self.lost_double_fault,
            "refused_in_a_row": dict(self._guard.refusals),
            "staleness": self.staleness.as_dict(),
            "workers": {
                w: {"inc": inc, "heard": self._heard.get(w)}
                for w, inc in self._incarnations.items()
            },
        }

    # Admission

    def _turn_away(self, peer: bytes, message: AnyRequest, speaker: str | None) -> Refusal | None:
        """Rules that hold for the whole message, before it is looked into."""
        if speaker is not None and speaker != message.w:
            text = f"this connection is by the key of {speaker}, and its message says {message.w}"
            return Refusal(code="key", text=text)
        if message.run != self.config.run:
            return Refusal(
                code="token", text=f"this is run {self.config.run}, you ask for {message.run}"
            )
        if isinstance(message, Hello):
            return None
        session = self._sessions.get(peer)
        if session != (message.w, message.inc):
            return Refusal(code="hello", text=f"{message.w} has not said hello on this connection")
        known = self._incarnations.get(message.w, 0)
        if message.inc < known:
            return _fenced(message.w, message.inc, known)
        if why := self._guard.quarantined(message.w, message.inc):
            return _quarantine(self.config.index, why)
        if message.ep > self.config.epoch:
            return self._depose(message)
        if message.ep != self.config.epoch:
            return Refusal(
                code="epoch",
                text=f"shard {self.config.index} is in epoch {self.config.epoch}, you speak of "
                f"{message.ep}: it was restarted, say hello again",
            )
        return None

    def _depose(self, message: AnyRequest) -> Refusal:
        """A worker has spoken with a later epoch of this shard."""
        self.is_deposed = True
        return Refusal(
            code="deposed",
            text=f"shard {self.config.index} epoch {self.config.epoch} was replaced: "
            f"{message.w} has seen epoch {message.ep}",
        )

    def _answer(self, peer: bytes, message: AnyRequest, payload: Payload) -> Reply | Refusal:
        if isinstance(message, Push):
            return self._push_or_refuse(message, payload)
        frames = [frame for frame in payload if not isinstance(frame, Tensor)]
        return self._answer_frames(peer, message, frames)

    def _push_or_refuse(self, message: Push, payload: Payload) -> Reply | Refusal:
        refusal = self._not_ready() or self._foreign_part(message.part)
        if refusal is not None:
            return refusal
        if len(payload) != len(message.part):
            return _junk(f"a push of {len(message.part)} parts with {len(payload)} frames")
        return self._push(message, payload)

    def _not_ready(self) -> Refusal | None:
        if self.is_ready:
            return None
        return Refusal(
            code="not-ready",
            text=f"shard {self.config.index} has no parameters yet: the first worker brings "
            "them; ask again",
        )

    def _answer_frames(
        self,
        peer: bytes,
        message: Hello | Init | Fetch | Merge | Leave | Sync | Query,
        payload: Sequence[Frame],
    ) -> Reply | Refusal:
        if isinstance(message, Hello):
            return self._hello(peer, message, payload)
        if isinstance(message, Leave):
            self._has_left.add(message.w)
            return Reply(Left(ep=self.config.epoch))
        if isinstance(message, Query):
            frame = json.dumps(self.stats()).encode()
            return Reply(Report(ep=self.config.epoch), (frame,))
        if isinstance(message, Init):
            return self._init(message, payload)
        refusal = self._not_ready()
        if refusal is not None:
            return refusal
        if isinstance(message, Merge):
            return self._merge(message, payload)
        if isinstance(message, Sync):
            return self._sync(message)
        if isinstance(message, Fetch):
            return self._foreign_part(message.part) or self._params(message)
        assert_never(message)

    def _foreign_part(self, parts: Sequence[int]) -> Refusal | None:
        for part in parts:
            if part not in self.parts:
                where = f"shard {self.config.index} of {self.config.num_shards}"
                return Refusal(code="part", text=f"{where} hosts no part {part}")
        return None

    def _hello(self, peer: bytes, message: Hello, payload: Sequence[Frame]) -> Reply | Refusal:
        if not hmac.compare_digest(message.token.encode(), self.config.token.encode()):
            return Refusal(code="token", text="the token is not this job's")
        if not message.lo <= wire.VERSION <= message.hi:
            return Refusal(
                code="version",
                text=f"{message.w} speaks protocol {message.lo} to {message.hi}, shard "
                f"{self.config.index} speaks {wire.VERSION}: install the same distbelief on both",
            )
        if message.ep > self.config.epoch:
            return self._depose(message)
        known = self._incarnations.get(message.w, 0)
        if message.inc < known:
            return _fenced(message.w, message.inc, known)
        if why := self._guard.quarantined(message.w, message.inc):
            return _quarantine(self.config.index, why)
        if len(payload) > 1:
            return _junk(f"a hello came with {len(payload)} frames")
        refusal = self._agree(bytes(payload[0])) if payload else None
        if refusal is not None:
            return refusal
        if self.contract is None:
            return Refusal(
                code="not-ready", text=f"shard {self.config.index} waits for its first worker"
            )
        self._incarnations[message.w] = message.inc
        self._sessions.pop(peer, None)
        self._sessions[peer] = (message.w, message.inc)
        while len(self._sessions) > SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]
        parts = self.parts.values()
        for part in parts:
            part.write_off(message.w, message.inc)
            part.skip(message.w, message.inc, message.first)
        welcome = Welcome(
            shard=self.config.index,
            shards=self.config.num_shards,
            ep=self.config.epoch,
            is_ready=self.is_ready,
            part=tuple(self.parts),
            version=tuple([part.version for part in parts]),
            samples=tuple([part.samples for part in parts]),
            bseq=tuple([row_of(part.table, message.w, message.inc).seq for part in parts]),
            restored=tuple([self._restored[part.range.index] for part in parts]),
            credits=self._credits(),
        )
        return Reply(welcome, () if payload else (self.contract.to_json(),))

    def _agree(self, text: bytes) -> Refusal | None:
        """Hold a contract against ours; the first one becomes ours."""
        try:
            theirs = Contract.from_json(text)
            if self.contract is None:
                self._adopt(theirs)
        except (RemoteProtocolError, ValueError) as error:
            return Refusal(code="contract", text=str(error))
        assert self.contract is not None
        difference = self.contract.first_difference(theirs)
        if difference is not None:
            return Refusal(
                code="contract",
                text=f"your model or job is not this run's: {difference} "
                "(here = the run's, there = yours). Was the model changed since the run began?",
            )
        return None

    def _adopt(self, contract: Contract) -> None:
        ranges = Partition(contract.layout, self.config.num_shards).parts_of(self.config.index)
        heap, scratch = Heap(), Scratch()
        home = heap if self._make_home is None else self._make_home(ranges)
        self.parts = {part.index: Part(part, contract, home, heap, scratch) for part in ranges}
        self._restored = dict.fromkeys(self.parts, 0)
        self.contract = contract
        self._decoded = scratch
        self._frames = Frames(max(part.numel for part in ranges))
        whole = 4 * sum(part.numel for part in ranges)
        self._message_bytes = max(min(whole, MESSAGE_BYTES), whole // CREDITS_MAX)

    # Values in and out

    def _init(self, message: Init, payload: Sequence[Frame]) -> Reply | Refusal:
        if self.is_ready:
            return Refusal(
                code="ready", text=f"shard {self.config.index} has its parameters already"
            )
        if message.part != tuple(self.parts) or len(payload) != len(message.part):
            return _junk(f"init must bring parts {list(self.parts)} of shard {self.config.index}")
        tensors: list[Tensor] = []
        for index, crc, frame in zip(message.part, message.crc, payload, strict=True):
            values = as_tensor(frame)
            if values is None or values.numel() != self.parts[index].range.numel:
                return _junk(f"part {index} came with {memoryview(frame).nbytes} bytes")
            if checksum(values) != crc:
                return _junk(f"part {index} does not have the checksum of its header")
            if not bool(torch.isfinite(values).all()):
                return _junk(f"first values of {self._bad_element(index, values)}")
            tensors.append(values)
        for index, values in zip(message.part, tensors, strict=True):
            self.parts[index].load_({VALUES: values})
        self.num_changes += 1
        return Reply(Ready(ep=self.config.epoch))

    def _params(self, message: Fetch) -> Reply:
        parts = [self.parts[index] for index in message.part]
        if message.average:
            payload, pins = self._averages(parts)
        else:
            payload, pins = self._values(parts, message.back) if message.values else ((), ())
        params = Params(
            ep=self.config.epoch,
            part=message.part,
            version=tuple([p.averaged if message.average else p.version for p in parts]),
            samples=tuple([part.samples for part in parts]),
            bseq=tuple([row_of(part.table, message.w, message.inc).seq for part in parts]),
            numel=tuple([part.range.numel for part in parts]) if message.values else (),
            credits=self._credits() if message.values else 0,
        )
        return Reply(params, payload, pins)

    def _sync(self, message: Sync) -> Reply:
        self.is_waited_for = self.is_waited_for or message.wants
        rows = [row_of(part.durable, message.w, message.inc) for part in self.parts.values()]
        synced = Synced(
            ep=self.config.epoch,
            part=tuple(self.parts),
            durable=tuple([row.seq for row in rows]),
            is_saved=self.is_saved,
            is_stalled=self.is_stalled,
        )
        return Reply(synced)

    def _credits(self) -> int:
        """How many messages each worker may have under way: whole ones, however short the last."""
        workers = max(1, self.num_workers)
        return min(max(self.config.budget // (workers * self._message_bytes), 1), CREDITS_MAX)

    def _values(
        self, parts: Sequence[Part], form: str
    ) -> tuple[tuple[Frame, ...], tuple[Held, ...]]:
        """Frames of the current values, and what holds them."""
        if form == "float32":
            pins = tuple([part.pin() for part in parts])
            return tuple([as_frame(pin[VALUES]) for pin in pins]), pins
        loans = tuple([self._frames.write(form, part.values) for part in parts])
        return tuple([as_frame(loan.frame) for loan in loans]), loans

    def _averages(self, parts: Sequence[Part]) -> tuple[tuple[Frame, ...], tuple[Held, ...]]:
        """As _values, of the averages; of the values where there is no average yet."""
        names = [SLOT if part.averaged else VALUES for part in parts]
        pins = tuple([part.pin((name,)) for part, name in zip(parts, names, strict=True)])
        frames = [as_frame(pin[name]) for pin, name in zip(pins, names, strict=True)]
        return tuple(frames), pins

    def _merge(self, message: Merge, payload: Sequence[Frame]) -> Reply | Refusal:
        assert self.contract is not None
        layout = self.contract.buffers
        sizes = [memoryview(frame).nbytes for frame in payload]
        if message.samples:
            if sizes != [4 * layout.num_floats, 8 * layout.num_integers] or (
                (message.floats, message.integers) != (layout.num_floats, layout.num_integers)
            ):
                return Refusal(
                    code="buffers",
                    text=f"{message.w} sent buffers of {sizes} bytes, the contract has "
                    f"{layout.num_floats} floats and {layout.num_integers} integers",
                )
            floats = torch.frombuffer(bytearray(payload[0]) or bytearray(4), dtype=torch.float32)
            integers = torch.frombuffer(bytearray(payload[1]) or bytearray(8), dtype=torch.int64)
            floats, integers = floats[: layout.num_floats], integers[: layout.num_integers]
            if not bool(torch.isfinite(floats).all()):
                return Refusal(code="buffers", text=f"{message.w} sent buffers with NaN or Inf")
            self.num_changes += 1
            self._buffers.add(message.w, message.samples, floats, integers)
        merged = self._buffers.merged()
        if merged is None:
            return Reply(Merged(ep=self.config.epoch, floats=0, integers=0), (b"", b""))
        return Reply(
            Merged(ep=self.config.epoch, floats=merged[0].numel(), integers=merged[1].numel()),
            (as_frame(merged[0]), as_frame(merged[1])),
        )

    # Push

    def _push(self, message: Push, payload: Payload) -> Reply:
        w, inc = message.w, message.inc
        parts = [self.parts[index] for index in message.part]
        grads = [_gradient(message.dt, frame) for frame in payload]
        rows = [row_of(part.table, w, inc) for part in parts]
        columns = range(len(parts))
        # Judged first, applied then, booked at the end: while megabytes pass through the cache the
        # loop in the middle must be short (in one loop the rest of the work took twice as long).
        fates = [
            self._judge(message, column, parts[column], rows[column], grads[column])
            for column in columns
        ]
        for column in columns:
            if fates[column] is _GOOD:
                grad = grads[column]
                assert grad is not None
                fates[column] = self._apply(message, column, parts[column], grad)
        staleness = self._book(message, parts, rows, fates)
        text = [fate.why for fate in fates if fate.why]
        if text:
            limit = TEXTS_MAX // len(text)
            text = [wire.sayable(fate.why, limit) for fate in fates]
        numel = [part.range.numel for part in parts] if message.fetch else []
        back, pins = self._values(parts, message.back) if message.fetch else ((), ())
        ack = Ack(
            ep=self.config.epoch,
            seq=message.seq,
            part=message.part,
            status=tuple([fate.word for fate in fates]),
            text=tuple(text),
            version=tuple([part.version for part in parts]),
            samples=tuple([part.samples for part in parts]),
            bseq=tuple([row_of(part.table, w, inc).seq for part in parts]),
            staleness=tuple(staleness),
            durable=tuple([row_of(part.durable, w, inc).seq for part in parts]),
            numel=tuple(numel),
            credits=0 if message.dt == SHARED else self._credits(),
        )
        if self._on_push is not None:
            self._on_push(message, ack)
        return Reply(ack, back, pins)

    def _judge(
        self, message: Push, column: int, part: Part, row: Applied, grad: Tensor | None
    ) -> "_Fate":
        """Rules 2 and 3 of the top of this file, but for the values; nothing is changed."""
        if message.seq != row.seq + 1:
            return self._out_of_turn(message, column, part, row, grad)
        numel, base = part.range.numel, message.base[column]
        if (
            grad is None
            or (grad.dtype == torch.float32 and grad.numel() != numel)
            or (message.numel and message.numel[column] != numel)
        ):
            came = "odd bytes" if grad is None else f"{grad.numel()} values"
            why = f"{_who(message, part)}: {came}, the part has {numel}: was the model changed?"
            return _Fate("numel", why)
        if message.crc and checksum(grad) != message.crc[column]:
            return _Fate("checksum", f"{_who(message, part)}: damaged on the way")
        if base > part.version:
            why = f"{_who(message, part)}: base version {base}, the part is at {part.version}"
            return _Fate("base", why)
        return _GOOD

    def _apply(self, message: Push, column: int, part: Part, grad: Tensor) -> "_Fate":
        """Rule 3, the values, and rule 4: the update."""
        if grad.dtype != torch.float32:
            decoded = self._decoded.of(part.range.numel)
            try:
                decode_(message.dt, as_frame(grad), decoded)
            except RemoteProtocolError as error:
                return _Fate("form", f"{_who(message, part)}: {error}")
            grad = decoded
        # One pass: NaN and Inf anywhere show in the sum of squares. It takes 1.1 ms for 28 MB, of
        # which the update gets half back, as it finds the gradient in the cache (isfinite takes
        # 37 ms and runs only to name the culprit).
        square = float(torch.dot(grad, grad))
        if not square < math.inf:  # NaN is not either
            why = f"{_who(message, part)}: gradient of {self._bad_element(part.range.index, grad)}"
            return _Fate("nonfinite", why)
        norm, index = math.sqrt(square), part.range.index
        limit, source = self._guard.limit(index)
        if limit and norm > limit:
            why = f"{_who(message, part)}: the gradient's norm is {norm:.3g}, above {limit:.3g} "
            return _Fate("norm", f"{why}({source}); {self._largest(index, grad)}")
        absent = message.absent[column] if message.absent else b""
        try:
            part.apply_(grad, message.samples, absent, norm)
        except RemoteProtocolError as error:  # the mask does not fit
            return _Fate("numel", f"{_who(message, part)}: {error}")
        self._guard.take(index, norm)
        if part.version % CHECK_EVERY == 0:
            self._check_part(part, message.w)
        return _GOOD

    def _check_part(self, part: Part, by: str) -> bool:
        """Values and state are finite; 1 ms for 28 MB."""
        for name, tensor in part.tensors.items():
            if not float(torch.dot(tensor, tensor)) < math.inf:
                what = self._bad_element(part.range.index, tensor)
                after = f", after a push of {by}" if by else ""
                self.spoiled = f"{name} of {what} at version {part.version}{after}"
                return False
        return True

    def _largest(self, index: int, values: Tensor) -> str:
        """Names the largest element of a part."""
        assert self.contract is not None
        at = int(values.abs().argmax())
        name = self.contract.layout.name_at(self.parts[index].range.start + at)
        return f"the largest is {name} = {float(values[at]):.3g}"

    def _book(
        self, message: Push, parts: list[Part], rows: list[Applied], fates: list["_Fate"]
    ) -> list[int]:
        """Write down what became of a push; returns its staleness, part by part."""
        w, inc, seq = message.w, message.inc, message.seq
        self.num_changes += 1
        self.counts.update([fate.word for fate in fates])
        crcs = message.crc or (0,) * len(parts)
        staleness = []
        for column, (part, row, fate) in enumerate(zip(parts, rows, fates, strict=True)):
            stale = 0
            if fate is _GOOD:
                own = row.own_since(message.bseq[column])
                stale = max(0, part.version - 1 - message.base[column] - own)
                is_steady = not self._has_left and len(part.table) >= self.config.num_workers
                self.staleness.add(stale, is_steady=is_steady)
                if self._on_apply is not None:
                    self._on_apply(
                        Application(
                            part.range.index,
                            part.version,
                            w,
                            inc,
                            seq,
                            stale,
                            message.samples,
                            crcs[column],
                        )
                    )
            if fate.why and fate.word not in _NOT_SPENT:
                self._guard.refuse(w, inc, seq, fate.why)
            if fate.word not in _NOT_SPENT:
                part.table[w] = row.after(
                    seq, crcs[column], message.samples, is_applied=fate is _GOOD
                )
            staleness.append(stale)
        return staleness

    def _out_of_turn(
        self, message: Push, column: int, part: Part, row: Applied, grad: Tensor | None
    ) -> "_Fate":
        """Rule 2: a repetition, or a hole."""
        who, seq = _who(message, part), message.seq
        if seq > row.seq:
            return _Fate("gap", f"{who}: the next seq here is {row.seq + 1}")
        if seq in row.refused:
            return _Fate("spent", f"{who}: seq {seq} was refused before")
        if seq == row.seq and message.crc and (grad is None or checksum(grad) != row.crc):
            return _Fate("conflict", f"{who}: seq {seq} was used before with other content")
        return _Fate("dup")

    def _bad_element(self, index: int, values: Tensor) -> str:
        assert self.contract is not None
        bad = torch.nonzero(~torch.isfinite(values))
        if not len(bad):
            largest = self._largest(index, values)
            return (
                f"part {index}: every value is finite, but their squares overflow float32: "
                f"{largest}"
            )
        first = int(bad[0])
        name = self.contract.layout.name_at(self.parts[index].range.start + first)
        return (
            f"{name} is {float(values[first])} ({len(bad)} values of part {index} are not finite)"
        )

    # Restore

    def _restore(self, image: ShardImage) -> None:
        mine = (self.config.run, self.config.index, self.config.num_shards)
        if (image.run, image.index, image.num_shards) != mine:
            raise ValueError(
                f"snapshot of run {image.run} shard {image.index} of {image.num_shards}, this is "
                f"run {mine[0]} shard {mine[1]} of {mine[2]}"
            )
        if image.epoch >= self.config.epoch:
            raise ValueError(
                f"snapshot of epoch {image.epoch}, this shard is in epoch {self.config.epoch}: "
                "a later one has been here"
            )
        self._adopt(image.contract)
        for saved in image.parts:
            part = self.parts[saved.index]
            part.load_(saved.tensors, saved.version, saved.samples, saved.averaged)
            part.table = dict(saved.table)
            part.durable = dict(saved.table)
            part.owed, part.lost = dict(saved.owed), saved.lost
            self._restored[saved.index] = saved.version
        self.staleness = Staleness.merged([image.staleness])
        self._buffers = BufferMerge(image.buffers)
        self._incarnations = dict(image.incarnations)


def _gradient(form: str, frame: Frame | Tensor) -> Tensor | None:
    """A pushed part as 1-D float32; as uint8 where it has to be decoded; None for odd bytes."""
    if isinstance(frame, Tensor):
        return frame
    return as_tensor(frame) if form == "float32" else as_bytes(frame)


def _who(message: Push, part: Part) -> str:
    return f"{message.w} push {message.seq} part {part.range.index}"


def _fenced(w: str, inc: int, known: int) -> Refusal:
    return Refusal(
        code="fenced",
        text=f"{w} incarnation {inc} was replaced by incarnation {known}: this process is a "
        "ghost and must end",
    )


def _quarantine(index: int, why: str) -> Refusal:
    return Refusal(code="quarantine", text=f"shard {index} takes no more: {why}")


def _junk(text: str) -> Refusal:
    return Refusal(code="junk", text=text)
