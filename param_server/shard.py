"""Shard: the state machine of the parameter server. No socket, no thread, no clock, no file.

`handle` takes one message of one peer and gives the one reply to it. Rule one: everything that
decides what becomes of a push lives in this file and in part.py.

The rules of a push, in this order:
1. Whole message, refused without change: unknown peer (`hello`), older incarnation (`fenced`),
   other epoch (`epoch`), no parameters yet (`not-ready`), foreign part (`part`), wrong number of
   frames (`junk`).
2. Part by part: a seq at or below the last one is a repetition: acknowledged again and not
   applied (`dup`), unless it was refused the first time (`spent`) or its content differs from
   what was last applied under that seq (`conflict`); a seq further than one ahead is a hole
   (`gap`). None of these consumes the seq.
3. From here on the seq is consumed, whatever happens, or one bad push would block its worker
   for ever: wrong length (`numel`), damaged (`checksum`), fetched from the future (`base`),
   NaN, Inf or overflowing norm (`nonfinite`): the part is unchanged.
4. Applied: values, state, version, samples and table change together.

What is unlovely: parts of one push may meet different fates. The step then counts as partial,
and the ack says so part by part; hiding it would not be honest.
"""

import hmac
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch
from torch import Tensor

from distbelief.param_server import wire
from distbelief.param_server.buffers import BufferMerge
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.image import PartImage, ShardImage
from distbelief.param_server.part import VALUES, Applied, Part, Pin
from distbelief.param_server.partition import Partition
from distbelief.param_server.protocol import (
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
    Welcome,
    as_frame,
    as_tensor,
    checksum,
)
from distbelief.param_server.staleness import Staleness

SESSIONS_MAX = 65_536
"""Connections remembered; the oldest is forgotten first and has to say hello again."""

TEXTS_MAX = 2048
"""Characters for the reasons of one ack: it has to fit into a header whatever happened."""

Frame = bytes | memoryview


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


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `pins` hold what the payload points to: release them when it has been sent."""

    message: AnyReply
    payload: tuple[Frame, ...] = ()
    pins: tuple[Pin, ...] = ()

    def release(self) -> None:
        for pin in self.pins:
            pin.release()


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
    ) -> None:
        """image: what to go on from; config.epoch must then be above the image's.

        Raises: ValueError if the image is of another shard or a later epoch.
        """
        self.config = config
        self.contract: Contract | None = None
        self.parts: dict[int, Part] = {}
        self.staleness = Staleness()
        self.counts: Counter[str] = Counter()
        """Pushed parts by what became of them, and refused messages by code."""
        self._buffers = BufferMerge()
        self._incarnations: dict[str, int] = {}
        self._sessions: dict[bytes, tuple[str, int]] = {}
        self._heard: dict[str, float] = {}
        self._has_left: set[str] = set()
        self._on_apply = on_apply
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
        self, peer: bytes, message: AnyRequest, payload: Sequence[Frame], now: float
    ) -> Reply:
        """Take one message and give the reply to it.

        peer: the connection it came from. payload: read only, and not kept after the call.
        now: seconds on any monotonic clock; only reported, it decides nothing.
        """
        refusal = self._turn_away(peer, message)
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
        names = (VALUES, *self.contract.rule.slots)
        pins = {index: part.pin(names) for index, part in self.parts.items()}
        return ShardImage(
            run=self.config.run,
            index=self.config.index,
            num_shards=self.config.num_shards,
            epoch=self.config.epoch,
            contract=self.contract,
            parts=tuple(
                PartImage(
                    index,
                    part.version,
                    part.samples,
                    dict(part.table),
                    {name: pins[index][name] for name in names},
                )
                for index, part in self.parts.items()
            ),
            staleness=Staleness.merged([self.staleness]),
            buffers=dict(self._buffers.contributions),
            incarnations=dict(self._incarnations),
            pins=tuple(pins.values()),
        )

    def mark_durable(self, image: ShardImage) -> None:
        """The image is on disk for good: tell it in every ack from now on."""
        for part in image.parts:
            self.parts[part.index].durable = dict(part.table)

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
            "staleness": self.staleness.as_dict(),
            "workers": {
                w: {"inc": inc, "heard": self._heard.get(w)}
                for w, inc in self._incarnations.items()
            },
        }

    # Admission

    def _turn_away(self, peer: bytes, message: AnyRequest) -> Refusal | None:
        """Rules that hold for the whole message, before it is looked into."""
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
        if message.ep != self.config.epoch:
            return Refusal(
                code="epoch",
                text=f"shard {self.config.index} is in epoch {self.config.epoch}, you speak of "
                f"{message.ep}: it was restarted, say hello again",
            )
        return None

    def _answer(
        self, peer: bytes, message: AnyRequest, payload: Sequence[Frame]
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
        if not self.is_ready:
            return Refusal(
                code="not-ready",
                text=f"shard {self.config.index} has no parameters yet: the first worker brings "
                "them; ask again",
            )
        if isinstance(message, Merge):
            return self._merge(message, payload)
        foreign = self._foreign_part(message.part)
        if foreign is not None:
            return foreign
        if isinstance(message, Fetch):
            return self._params(message)
        if isinstance(message, Push):
            if len(payload) != len(message.part):
                return _junk(f"a push of {len(message.part)} parts with {len(payload)} frames")
            return self._push(message, payload)
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
        known = self._incarnations.get(message.w, 0)
        if message.inc < known:
            return _fenced(message.w, message.inc, known)
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
        welcome = Welcome(
            shard=self.config.index,
            shards=self.config.num_shards,
            ep=self.config.epoch,
            is_ready=self.is_ready,
            part=tuple(self.parts),
            version=tuple(part.version for part in parts),
            samples=tuple(part.samples for part in parts),
            bseq=tuple(_row(part.table, message.w, message.inc).seq for part in parts),
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
        partition = Partition(contract.layout, self.config.num_shards)
        self.parts = {
            part.index: Part(part, contract) for part in partition.parts_of(self.config.index)
        }
        self.contract = contract

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
        return Reply(Ready(ep=self.config.epoch))

    def _params(self, message: Fetch) -> Reply:
        parts = [self.parts[index] for index in message.part]
        pins = tuple(part.pin() for part in parts)
        params = Params(
            ep=self.config.epoch,
            part=message.part,
            version=tuple(part.version for part in parts),
            samples=tuple(part.samples for part in parts),
            bseq=tuple(_row(part.table, message.w, message.inc).seq for part in parts),
            numel=tuple(part.range.numel for part in parts),
        )
        return Reply(params, tuple(as_frame(pin[VALUES]) for pin in pins), pins)

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
            self._buffers.add(message.w, message.samples, floats, integers)
        merged = self._buffers.merged()
        if merged is None:
            return Reply(Merged(ep=self.config.epoch, floats=0, integers=0), (b"", b""))
        return Reply(
            Merged(ep=self.config.epoch, floats=merged[0].numel(), integers=merged[1].numel()),
            (as_frame(merged[0]), as_frame(merged[1])),
        )

    # Push

    def _push(self, message: Push, payload: Sequence[Frame]) -> Reply:
        status: list[str] = []
        text: list[str] = []
        staleness: list[int] = []
        for column, index in enumerate(message.part):
            word, why, stale = self._push_part(message, column, self.parts[index], payload[column])
            self.counts[word] += 1
            status.append(word)
            text.append(wire.sayable(why, TEXTS_MAX // len(message.part)))
            staleness.append(stale)
        parts = [self.parts[index] for index in message.part]
        pins = tuple(part.pin() for part in parts) if message.fetch else ()
        ack = Ack(
            ep=self.config.epoch,
            seq=message.seq,
            part=message.part,
            status=tuple(status),
            text=tuple(text),
            version=tuple(part.version for part in parts),
            samples=tuple(part.samples for part in parts),
            bseq=tuple(_row(part.table, message.w, message.inc).seq for part in parts),
            staleness=tuple(staleness),
            durable=tuple(_row(part.durable, message.w, message.inc).seq for part in parts),
            numel=tuple(part.range.numel for part in parts) if message.fetch else (),
        )
        return Reply(ack, tuple(as_frame(pin[VALUES]) for pin in pins), pins)

    def _push_part(
        self, message: Push, column: int, part: Part, frame: Frame
    ) -> tuple[str, str, int]:
        """(status, why, staleness) of one part of a push; rules 2 to 4 of the top of this file."""
        row = _row(part.table, message.w, message.inc)
        index, seq, crc = part.range.index, message.seq, message.crc[column]
        grad = as_tensor(frame)
        who = f"{message.w} push {seq} part {index}"
        if seq <= row.seq:
            if seq in row.refused:
                return "spent", f"{who}: seq {seq} was refused before", 0
            if seq == row.seq and (grad is None or checksum(grad) != row.crc):
                return "conflict", f"{who}: seq {seq} was used before with other content", 0
            return "dup", "", 0
        if seq > row.seq + 1:
            return "gap", f"{who}: the next seq here is {row.seq + 1}", 0

        word, why, norm = self._examine(message, column, part, grad, who)
        if word == "applied":
            assert grad is not None
            stale = max(
                0, part.version - message.base[column] - row.own_since(message.bseq[column])
            )
            is_steady = not self._has_left and self._all_pushed(part)
            try:
                part.apply_(grad, message.samples, message.absent[column], norm)
            except RemoteProtocolError as error:  # the mask does not fit
                word, why = "numel", f"{who}: {error}"
        part.table[message.w] = row.after(seq, crc, is_applied=word == "applied")
        if word != "applied":
            return word, why, 0
        self.staleness.add(stale, is_steady=is_steady)
        if self._on_apply is not None:
            self._on_apply(
                Application(
                    index, part.version, message.w, message.inc, seq, stale, message.samples, crc
                )
            )
        return word, "", stale

    def _examine(
        self, message: Push, column: int, part: Part, grad: Tensor | None, who: str
    ) -> tuple[str, str, float]:
        """(status, why, norm of the gradient); nothing is changed."""
        numel = part.range.numel
        if grad is None or grad.numel() != numel or message.numel[column] != numel:
            came = "odd bytes" if grad is None else f"{grad.numel()} values"
            return "numel", f"{who}: {came}, the part has {numel}: was the model changed?", 0.0
        if checksum(grad) != message.crc[column]:
            return "checksum", f"{who}: damaged on the way", 0.0
        if message.base[column] > part.version:
            return (
                "base",
                f"{who}: base version {message.base[column]}, the part is at {part.version}",
                0.0,
            )
        # One pass: NaN and Inf anywhere show in the sum of squares (1.1 ms for 28 MB; isfinite
        # takes 37 ms and runs only to name the culprit).
        square = float(torch.dot(grad, grad))
        if not math.isfinite(square):
            return "nonfinite", f"{who}: gradient of {self._bad_element(part.range.index, grad)}", 0
        return "applied", "", math.sqrt(square)

    def _bad_element(self, index: int, values: Tensor) -> str:
        assert self.contract is not None
        bad = torch.nonzero(~torch.isfinite(values))
        if not len(bad):
            return f"part {index}: every value is finite, but their squares overflow float32"
        first = int(bad[0])
        name = self.contract.layout.name_at(self.parts[index].range.start + first)
        return (
            f"{name} is {float(values[first])} ({len(bad)} values of part {index} are not finite)"
        )

    def _all_pushed(self, part: Part) -> bool:
        return len(part.table) >= self.config.num_workers

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
            part.load_(dict(saved.tensors))
            part.version, part.samples = saved.version, saved.samples
            part.table = dict(saved.table)
            part.durable = dict(saved.table)
        self.staleness = Staleness.merged([image.staleness])
        self._buffers = BufferMerge(image.buffers)
        self._incarnations = dict(image.incarnations)


def _row(table: Mapping[str, Applied], w: str, inc: int) -> Applied:
    """How far an incarnation has come; a new one begins at 0, whatever the one before pushed."""
    row = table.get(w)
    return row if row is not None and row.inc == inc else Applied(inc)


def _fenced(w: str, inc: int, known: int) -> Refusal:
    return Refusal(
        code="fenced",
        text=f"{w} incarnation {inc} was replaced by incarnation {known}: this process is a "
        "ghost and must end",
    )


def _junk(text: str) -> Refusal:
    return Refusal(code="junk", text=text)
