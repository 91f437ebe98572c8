"""Arena: the parameters and gradients of a replica as views of flat vectors.

Where a parameter is float32 on the CPU it is a view, so that nothing is flattened: fetched
values become the parameters by turning the views to another vector. Other parameters (half
precision, CUDA) keep their own memory and are copied from and to the float32 vector.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from distbelief.param_server.layout import Entry, Layout


class Arena:
    """Binds parameters to flat vectors. `named` in the order of the layout's entries."""

    def __init__(self, layout: Layout, named: Sequence[tuple[str, Parameter]]) -> None:
        assert [name for name, _ in named] == [entry.name for entry in layout.entries]
        self.layout = layout
        self.grad = torch.zeros(layout.total)
        """1-D float32: this step's gradient, zero where a tensor is absent."""
        self._slots = [
            _Slot(index, entry, parameter, self.grad[entry.offset : entry.stop].view(entry.shape))
            for index, (entry, (_, parameter)) in enumerate(zip(layout.entries, named, strict=True))
        ]
        self.on_backward: Callable[[], None] | None = None
        """Called whenever backward has reached one of the parameters."""
        self.on_touch: Callable[..., None] | None = None
        """Called with the index of an entry, and `again`, whenever backward has completed its
        gradient; the gradient is then in the arena."""
        self._hooks: list[RemovableHandle] = []
        for slot in self._slots:
            self._hooks.append(slot.parameter.register_hook(slot.refuse_sparse))  # type: ignore[no-untyped-call]  # torch does not annotate it
            self._hooks.append(
                slot.parameter.register_post_accumulate_grad_hook(partial(self._touch, slot))  # type: ignore[no-untyped-call]  # nor this
            )

    def gather(self) -> Tensor:
        """The parameters as they are, copied into a new 1-D float32 vector."""
        flat = torch.empty(self.layout.total)
        for slot in self._slots:
            entry = slot.entry
            flat[entry.offset : entry.stop].view(entry.shape).copy_(slot.parameter.detach())
        return flat

    def bind(self, values: Tensor) -> None:
        """Make `values` the parameters: views turn to it, others are copied from it."""
        with torch.no_grad():
            for slot in self._slots:
                view = values[slot.entry.offset : slot.entry.stop].view(slot.entry.shape)
                if slot.is_view:
                    slot.parameter.data = view
                    slot.address = view.data_ptr()
                else:
                    slot.parameter.copy_(view)

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
        """Begin a step: all gradients zero and absent.

        set_to_none=False: those that are there stay there, as zeros; so decay and momentum still
        move a tensor that the next backward pass does not reach.
        """
        kept = [] if set_to_none else [slot for slot in self._slots if not slot.is_absent]
        self.grad.zero_()
        for slot in self._slots:
            slot.is_touched = False
            slot.parameter.grad = slot.view if slot.is_view else None
        for slot in kept:
            slot.is_touched = True
            if not slot.is_view:
                slot.parameter.grad = torch.zeros_like(slot.parameter)

    def collect(self) -> list[str]:
        """Bring gradients that left the arena back in; returns the names of absent tensors.

        Absent: no backward pass has reached it since `zero_grad`, and nobody has set a `.grad`
        of their own or written into it. Raises: ValueError naming a sparse gradient.
        """
        absent: list[str] = []
        for slot in self._slots:
            grad = slot.parameter.grad
            if slot.is_absent:
                absent.append(slot.entry.name)
                slot.view.zero_()
            elif grad is not None and grad is not slot.view:
                slot.refuse_sparse(grad)
                slot.view.copy_(grad.detach())  # it has a graph after backward(create_graph=True)
        return absent

    def forget_touches(self) -> None:
        """From here on a gradient counts as that of another step."""
        for slot in self._slots:
            slot.is_touched = False

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _touch(self, slot: "_Slot", parameter: Tensor) -> None:
        if self.on_backward is not None:
            self.on_backward()
        if self.on_touch is not None:
            grad = parameter.grad
            if grad is not slot.view:
                assert grad is not None
                slot.view.copy_(grad.detach())
                if slot.is_view:
                    parameter.grad = slot.view
            self.on_touch(slot.index, again=slot.is_touched)
        slot.is_touched = True


class _Slot:
    """One tensor: its parameter, its place in the gradient, and whether backward reached it."""

    def __init__(self, index: int, entry: Entry, parameter: Parameter, view: Tensor) -> None:
        self.index = index
        self.entry = entry
        self.parameter = parameter
        self.view = view
        self.is_view = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        self.is_touched = False
        self.address = parameter.data_ptr()

    @property
    def is_absent(self) -> bool:
        """No gradient: where torch has None, a parameter here has zeros that nobody touched."""
        grad = self.parameter.grad
        if grad is None:
            return True
        return grad is self.view and not self.is_touched and not bool(grad.any())

    def refuse_sparse(self, grad: Tensor) -> None:
        if grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {self.entry.name} {list(self.entry.shape)} is sparse: parts "
                "are dense ranges. Use sparse=False in its Embedding"
            )


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
