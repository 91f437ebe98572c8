"""Arena: the parameters and gradients of a replica as views of flat vectors.

Where a parameter is float32 on the CPU it is a view, so that nothing is flattened: fetched
values become the parameters by turning the views to another vector. On a CUDA device it is a view
of one vector that never moves, and fetched values are copied into that (staging.py). Other
parameters (half precision, several devices) keep their own memory and are copied from and to the
float32 vector.

A tensor has a gradient where torch would have one: `zero_grad` leaves none, backward makes a new
one, and a hook brings that into the arena and hangs the arena's view in its place. Copying it in
reads and writes it once; zeros to add it to would be written, read and written again.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from distbelief.param_server.layout import Entry, Layout
from distbelief.workers.staging import AT_ONCE, InPlace, Ready, Staging

VIEWS_MAX = 80
"""Vectors whose views are remembered: two of parameters, and the gradients that are kept."""


class Arena:
    """Binds parameters to flat vectors. `named` in the order of the layout's entries."""

    def __init__(
        self,
        layout: Layout,
        named: Sequence[tuple[str, Parameter]],
        grad: Tensor | None = None,
        staging: Staging | None = None,
    ) -> None:
        """grad: 1-D float32 [layout.total] on the staging's device; the arena's from here on.

        staging: `staging_of` these parameters; without one they are on the CPU, or copied there.
        """
        assert [name for name, _ in named] == [entry.name for entry in layout.entries]
        self.layout = layout
        self.staging = InPlace() if staging is None else staging
        self.grad = torch.zeros(layout.total) if grad is None else grad
        """1-D float32: this step's gradient; complete, and zero where a tensor is absent, after
        `collect`."""
        self.values: Tensor | None = None
        """1-D float32: the parameters, once they are bound."""
        self.is_repeated = False
        """Some tensor got a gradient more than once in one step."""
        self._slots = [
            _Slot(index, entry, parameter, self.grad)
            for index, (entry, (_, parameter)) in enumerate(zip(layout.entries, named, strict=True))
        ]
        self._views: dict[int, list[Tensor]] = {}
        """By the address of a vector: views of it, one a tensor."""
        self.on_backward: Callable[[], None] | None = None
        """Called whenever backward has reached one of the parameters."""
        self.on_touch: Callable[..., None] | None = None
        """Called with the index of an entry, and `again`, whenever backward has completed its
        gradient; the gradient is then in the arena."""
        self._hooks: list[RemovableHandle] = [
            slot.parameter.register_post_accumulate_grad_hook(partial(self._touch, slot))  # type: ignore[no-untyped-call]  # torch does not annotate it
            for slot in self._slots
        ]

    @property
    def device(self) -> torch.device:
        """Of its first parameter."""
        return self._slots[0].parameter.device

    def gather(self) -> Tensor:
        """The parameters as they are, copied into a new 1-D float32 vector of the host."""
        flat = torch.empty(self.layout.total)
        for slot in self._slots:
            entry = slot.entry
            flat[entry.offset : entry.stop].view(entry.shape).copy_(slot.parameter.detach())
        return flat

    def bind(self, values: Tensor) -> Ready:
        """Make `values` the parameters: views turn to it, others are copied from it.

        values: 1-D float32 [layout.total] of the host. On the CPU it is the parameters until the
        next `bind`; elsewhere it is read until what is returned is ready.
        """
        ready: Ready = AT_ONCE
        if self.staging.is_in_place:
            home = values
        else:
            home = self.staging.vector(values.numel()) if self.values is None else self.values
            # Everything that was called for until now may still read the old values.
            ready = self.staging.copy_in(values, home, self.staging.mark())
            self.staging.hold(ready)
        if home is not self.values:
            self._turn(home)
        self._copy_others()
        return ready

    def step_locally(self, lr: float) -> None:
        """A plain step of gradient descent on the bound values."""
        assert self.values is not None
        self.values.add_(self.grad, alpha=-lr)
        self._copy_others()

    def check(self) -> None:
        """See that every parameter still is where `bind` has put it.

        Raises: ValueError naming one that was moved, as by `module.to(...)` or `p.data = ...`.
        """
        for slot in self._slots:
            moved = slot.parameter.data_ptr() != slot.address and slot.entry.numel
            if slot.is_view and moved:
                raise ValueError(
                    f"{slot.entry.name} {list(slot.entry.shape)} no longer lies in Downpour's "
                    "vector: it was moved or replaced after Downpour was made. Move the model to "
                    "its device and type first"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step: no tensor has a gradient.

        set_to_none=False: those that are there stay there, as zeros; so decay and momentum still
        move a tensor that the next backward pass does not reach.
        """
        for slot in self._slots:
            slot.is_touched = False
            if set_to_none or slot.parameter.grad is None:
                slot.parameter.grad = None
            elif slot.is_view:
                slot.view.zero_()
                slot.parameter.grad = slot.view
            else:
                slot.parameter.grad = torch.zeros_like(slot.parameter)

    def collect(self) -> list[str]:
        """Bring gradients that are not in the arena into it; returns the names of absent tensors.

        Absent is one without a gradient, as in torch. Raises: ValueError naming a sparse gradient.
        """
        absent: list[str] = []
        for slot in self._slots:
            grad = slot.parameter.grad
            if grad is None:
                absent.append(slot.entry.name)
                slot.view.zero_()
            elif grad is not slot.view:
                slot.take(grad)
        return absent

    def turn_grad(self, grad: Tensor, *, keeps: bool) -> None:
        """Compute the next gradient in another vector; the one before is not written to any more.

        grad: 1-D float32 [layout.total] of the staging's device. keeps: parameters keep their
        gradients, with the same values, as torch's do after a step; else they have none.
        """
        if keeps:
            grad.copy_(self.grad)
        for slot, view in zip(self._slots, self._views_of(grad), strict=True):
            if slot.parameter.grad is slot.view:
                slot.parameter.grad = view if keeps else None
            slot.view = view
        self.grad = grad

    def forget_touches(self) -> None:
        """From here on a gradient counts as that of another step."""
        for slot in self._slots:
            slot.is_touched = False

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _turn(self, home: Tensor) -> None:
        """Make the views those of another vector."""
        for slot, view in zip(self._slots, self._views_of(home), strict=True):
            if slot.is_view:
                slot.parameter.data = view
                slot.address = view.data_ptr()
        self.values = home

    def _views_of(self, vector: Tensor) -> list[Tensor]:
        """116 cached views take 0.03 ms, new ones 0.4 ms."""
        address = vector.data_ptr()
        views = self._views.get(address)
        if views is None:
            if len(self._views) == VIEWS_MAX:
                self._views.clear()
            views = self._views[address] = [slot.entry_of(vector) for slot in self._slots]
        return views

    def _copy_others(self) -> None:
        """Give the parameters that are no views their values."""
        assert self.values is not None
        with torch.no_grad():
            for slot in self._slots:
                if not slot.is_view:
                    slot.parameter.copy_(slot.entry_of(self.values))

    def _touch(self, slot: "_Slot", parameter: Tensor) -> None:
        if self.on_backward is not None:
            self.on_backward()
        grad = parameter.grad
        if grad is not slot.view:
            assert grad is not None
            # One with a graph, of backward(create_graph=True), is the script's until `collect`.
            is_ours = slot.is_view and not grad.requires_grad
            if is_ours or self.on_touch is not None:
                slot.take(grad)
            if is_ours:
                parameter.grad = slot.view
        self.is_repeated = self.is_repeated or slot.is_touched
        if self.on_touch is not None:
            self.on_touch(slot.index, again=slot.is_touched)
        slot.is_touched = True


class _Slot:
    """One tensor: its parameter, its place in the gradient, and whether backward reached it."""

    def __init__(self, index: int, entry: Entry, parameter: Parameter, flat: Tensor) -> None:
        """flat: the whole gradient."""
        self.index = index
        self.entry = entry
        self.parameter = parameter
        self.view = self.entry_of(flat)
        self.is_view = parameter.dtype == torch.float32 and parameter.device == flat.device
        self.is_touched = False
        self.address = parameter.data_ptr()

    def entry_of(self, flat: Tensor) -> Tensor:
        """Its place in a flat vector, with its shape."""
        return flat[self.entry.offset : self.entry.stop].view(self.entry.shape)

    def take(self, grad: Tensor) -> None:
        """Bring a gradient into the arena. Raises: ValueError if it is sparse."""
        if grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {self.entry.name} {list(self.entry.shape)} is sparse: parts "
                "are dense ranges. Use sparse=False in its Embedding"
            )
        self.view.copy_(grad.detach())  # it has a graph after backward(create_graph=True)


def refuse_sparse_modules(modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Find embeddings with sparse gradients before the first step.

    Raises: ValueError naming the parameter.
    """
    for name, module in modules:
        if not isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            continue
        if module.sparse and module.weight.requires_grad:
            weight = f"{name}.weight" if name else "weight"
            raise ValueError(
                f"{weight} will have sparse gradients ({type(module).__name__} with "
                "sparse=True): parts are dense ranges. Use sparse=False"
            )
