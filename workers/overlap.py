"""Overlap: sends the parts of a push while backward is still running.

Autograd completes the layers near the loss first. As soon as every tensor of a message has its
gradient the message leaves, so that network and apply run beside the rest of backward. A gradient
must then not change any more: no accumulation over several backward passes, no clipping of the
whole, no loss scaling. Under torch.compile all gradients come at the end: nothing overlaps then,
and nothing is wrong either.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future

from distbelief.param_server.client import Client, Fetched, PushTicket
from distbelief.param_server.layout import PartRange
from distbelief.param_server.link import Ticket
from distbelief.param_server.protocol import checksum
from distbelief.workers.arena import Arena
from distbelief.workers.comm import Calls


class Overlap:
    """The push of one step, message by message. Used by one thread at a time."""

    def __init__(
        self,
        arena: Arena,
        comm: Calls,
        begin: Callable[[], tuple[int, Fetched, Fetched | None]],
    ) -> None:
        """begin: called when the first message is complete; gives what `Client.begin_push`
        takes: samples, the copy that the gradient is computed on, and where to fetch into."""
        self._arena = arena
        self._comm = comm
        self._begin = begin
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
        self._sends: list[Future[Ticket]] = []
        self._nothing_absent = arena.layout.absent_masks(())
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
            message.sum = None

    def finish(self, absent: Iterable[str]) -> Future[Ticket]:
        """Send what has not left; `absent` names the tensors without a gradient.

        Returns the future of the push. Raises: ValueError where a gradient was changed after
        its message had left.
        """
        masks = self._arena.layout.absent_masks(absent)
        future = self._open()
        for message in self._messages:
            if message.sum is None:
                self._send(message, masks)
            elif message.sum != self._sum_of(message):
                raise ValueError(
                    f"a gradient of {self._names(message)} was changed after it had left: with "
                    "overlap=True gradients must not be touched between backward and step. "
                    "Clipping and scaling need overlap=False"
                )
        for send in self._sends:
            send.result()
        self._future, self._sends, self._ticket = None, [], []
        return future

    def _touch(self, index: int, *, again: bool) -> None:
        """Backward has completed the gradient of a tensor."""
        if again:
            raise ValueError(
                f"{self._arena.layout.entries[index].name} got a second gradient in one step: "
                "with overlap=True its first one has left already. For accumulation over several "
                "backward passes, overlap=False"
            )
        for message in self._of_slot[index]:
            message.waits_for -= 1
            if message.waits_for == 0:
                message.sum = self._sum_of(message)
                self._send(message, self._nothing_absent)

    def _open(self) -> "Future[Ticket]":
        if self._future is None:
            samples, base, into = self._begin()
            holder = self._ticket = []

            def begin(client: Client) -> Ticket:
                holder.append(client.begin_push(samples, base, into))
                return holder[0]

            self._future = self._comm.submit(begin)
        return self._future

    def _send(self, message: "_Message", masks: tuple[bytes, ...]) -> None:
        self._open()
        holder, grad = self._ticket, self._arena.grad

        def send(client: Client) -> Ticket:
            client.send_push(holder[0], message.index, grad, masks)
            return Ticket(0)

        self._sends.append(self._comm.submit(send))

    def _sum_of(self, message: "_Message") -> tuple[int, ...]:
        grad = self._arena.grad
        return tuple(checksum(grad[part.start : part.stop]) for part in message.parts)

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
        self.parts = parts
        self.start, self.stop = parts[0].start, parts[-1].stop
        self.num_slots = 0
        """Tensors that have elements in it."""
        self.waits_for = 0
        self.sum: tuple[int, ...] | None = None
        """Checksums of its parts when it left; None while it has not."""
