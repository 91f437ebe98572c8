"""Overlap: sends the parts of a push while backward is still running.

Autograd completes the layers near the loss first. As soon as every tensor of a message has its
gradient the message leaves, so that network and apply run beside the rest of backward. A gradient
must then not change any more: no accumulation over several backward passes, no clipping of the
whole, no loss scaling. Under torch.compile all gradients come at the end: nothing overlaps then,
and nothing is wrong either.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from distbelief.param_server.client import Client, Fetched, PushTicket
from distbelief.param_server.layout import PartRange
from distbelief.param_server.link import Ticket
from distbelief.workers.arena import Arena
from distbelief.workers.comm import Calls
from distbelief.workers.outgoing import Outgoing, wait_for
from distbelief.workers.staging import Mark, Reading


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a push begins with; see `Client.begin_push`."""

    samples: int
    base: Fetched
    """The copy that the gradient is computed on."""
    into: Fetched | None
    checks: Sequence[Callable[[], object]] = ()
    """Called in the comm thread before anything leaves; what they raise stops the push."""


class Overlap:
    """The push of one step, message by message. Used by one thread at a time."""

    def __init__(
        self,
        arena: Arena,
        outgoing: Outgoing,
        comm: Calls,
        begin: Callable[[], Beginning],
        *,
        verifies: bool,
    ) -> None:
        """outgoing: the arena's gradient. begin: called when the first message is complete.

        verifies: look at `verify` whether a gradient was changed after it had left, at the cost
        of reading it twice more; for code that is not ours.
        """
        self._arena = arena
        self._outgoing = outgoing
        self._comm = comm
        self._begin = begin
        self._verifies = verifies
        self._messages = [_Message(i, parts) for i, parts in enumerate(comm.connect().messages)]
        self._of_slot: list[list[_Message]] = []
        for entry in arena.layout.entries:
            touched = [m for m in self._messages if entry.offset < m.stop and m.start < entry.stop]
            self._of_slot.append(touched)
            for message in touched:
                message.num_slots += 1
        self._ticket: list[PushTicket] = []
        """The push under way, put here by the comm thread."""
        self._future: Future[Ticket] | None = None
        self._nothing_absent = arena.layout.absent_masks(())
        self.reset()
        arena.on_touch = self._touch

    @property
    def is_open(self) -> bool:
        """Some message of a push has left, and `finish` has not been called."""
        return self._future is not None

    def reset(self) -> None:
        """A new step begins."""
        assert not self.is_open
        for message in self._messages:
            message.waits_for = message.num_slots
            message.has_left = False
            message.streams.clear()
            message.fingerprint = None

    def finish(self, absent: Iterable[str]) -> Future[Ticket]:
        """Send what has not left, near the loss first; `absent` names tensors without a gradient.

        Returns the future of the push.
        """
        left = [message for message in reversed(self._messages) if not message.has_left]
        if left:
            masks = self._arena.layout.absent_masks(absent)
            after = self._arena.staging.mark()
            for message in left:
                self._send(message, masks, after)
        future, self._future = self._future, None
        assert future is not None
        return future

    def give_up(self) -> Future[Ticket]:
        """Backward has failed half-way: end the push, without what has not left."""
        for message in self._messages:
            if not message.has_left:
                self._arena.grad[message.start : message.stop].zero_()
        return self.finish(entry.name for entry in self._arena.layout.entries)

    def verify(self) -> None:
        """After the push was answered: see that its gradient is what left.

        Raises: ValueError naming tensors whose gradient was changed in between.
        """
        if not self._verifies:
            return
        now = [
            (m, m.fingerprint, self._fingerprint(m))
            for m in self._messages
            if m.fingerprint is not None
        ]
        for message, before, after in now:
            if before.value != after.value:
                raise ValueError(
                    f"a gradient of {self._names(message)} was changed after it had left: with "
                    "overlap=True gradients must not be touched between backward and step. "
                    "Clipping and scaling need overlap=False"
                )

    def _touch(self, index: int, *, again: bool) -> None:
        """Backward has completed the gradient of a tensor."""
        messages = self._of_slot[index]
        if again and any(message.has_left for message in messages):
            raise ValueError(
                f"{self._arena.layout.entries[index].name} got a second gradient in one step: "
                "with overlap=True its first one has left already. For accumulation over several "
                "backward passes, overlap=False (train.overlap of a job)"
            )
        staging = self._arena.staging
        for message in messages:
            assert not message.has_left
            message.streams.add(staging.stream())
            message.waits_for -= not again
            if message.waits_for == 0:
                if self._verifies:
                    message.fingerprint = self._fingerprint(message)
                self._send(message, self._nothing_absent, staging.mark(message.streams))

    def _send(self, message: "_Message", masks: tuple[bytes, ...], after: Mark) -> None:
        message.has_left = True
        beginning = None
        if self._future is None:
            beginning = self._begin()
            self._ticket = []
        ticket, outgoing = self._ticket, self._outgoing

        def send(client: Client) -> Ticket:
            wait_for(outgoing.copy_out(message.start, message.stop, after), client)
            if beginning is not None:
                for check in beginning.checks:
                    check()
                begin = client.begin_push
                push = begin(beginning.samples, beginning.base, beginning.into, outgoing.host)
                ticket.append(push)
            if not ticket:  # a check has stopped this push
                return Ticket(0)
            client.send_push(ticket[0], message.index, outgoing.host, masks)
            return ticket[0]

        if self._future is None:
            self._future = self._comm.submit(send)
        else:
            self._comm.post(send)

    def _fingerprint(self, message: "_Message") -> Reading:
        return self._arena.staging.fingerprint(self._arena.grad[message.start : message.stop])

    def _names(self, message: "_Message") -> str:
        names = [
            e.name
            for e, m in zip(self._arena.layout.entries, self._of_slot, strict=True)
            if message in m
        ]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


class _Message:
    """One message of a push: some parts that lie beside each other."""

    def __init__(self, index: int, parts: tuple[PartRange, ...]) -> None:
        self.index = index
        self.start, self.stop = parts[0].start, parts[-1].stop
        self.num_slots = 0
        """Tensors that have elements in it."""
        self.waits_for = 0
        self.has_left = False
        self.streams: set[torch.cuda.Stream | None] = set()
        """Those that its gradient is computed on."""
        self.fingerprint: Reading | None = None
        """Of its gradient when it left early; None while it has not."""
