"""How a batch becomes gradients: precision, layout and compiler change nothing that others see."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from distbelief.workers.compute import PRECISIONS, SCALE, Compute, ComputeConfig
from distbelief.workers.worker import loss_of


def net() -> nn.Sequential:
    """Small, and without batch norm, whose gradients of few images double each rounding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def gradients(config: ComputeConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a batch, and the gradient of each parameter."""
    model = net()
    compute = Compute(model, lambda outputs, targets: loss_of(model, outputs, targets), config)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, 3, 16, 16, generator=generator)
    targets = torch.randint(0, 10, (8,), generator=generator)
    loss = compute.loss(*compute.place(inputs, targets))
    compute.backward(loss)
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_of_half_precision_are_float32_and_near(precision):
    loss, exact = gradients(ComputeConfig())
    half_loss, half = gradients(ComputeConfig(precision=precision))
    assert {grad.dtype for grad in half} == {torch.float32}
    assert float(half_loss) == pytest.approx(float(loss), rel=0.02)
    assert float(half_loss) != float(loss)  # it was another precision
    flat, half_flat = (torch.cat([g.flatten() for g in grads]) for grads in (exact, half))
    cosine = torch.nn.functional.cosine_similarity(flat, half_flat, dim=0)
    assert float(cosine) > 0.99
    assert float(half_flat.norm()) == pytest.approx(float(flat.norm()), rel=0.05)


def test_channels_last_changes_nothing_but_rounding():
    loss, exact = gradients(ComputeConfig())
    other_loss, other = gradients(ComputeConfig(channels_last=True))
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    for one, two in zip(exact, other, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5)


def test_a_batch_is_placed_as_asked():
    config = ComputeConfig(channels_last=True)
    compute = Compute(nn.Linear(2, 2), lambda *_: torch.zeros(()), config)
    images, targets = compute.place(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.shape == (2,)
    words, _ = compute.place({"ids": torch.zeros(2, 3)}, torch.zeros(2))
    assert words["ids"].is_contiguous()


def total(factor: float):
    def of(outputs: object, _: object) -> torch.Tensor:
        assert isinstance(outputs, torch.Tensor)
        return outputs.sum() * factor

    return of


def test_float16_keeps_gradients_that_would_vanish_and_scales_less_after_an_overflow():
    model = nn.Linear(4, 1, bias=False)
    compute = Compute(model, total(1e-7), ComputeConfig())
    scaled = Compute(model, total(1e-7), ComputeConfig(precision="float16"))
    assert (compute.scale, scaled.scale) == (1.0, SCALE)
    scaled.backward(scaled.loss(torch.ones(1, 4), None))
    assert model.weight.grad is not None
    assert model.weight.grad.flatten().tolist() == pytest.approx([1e-7] * 4, rel=0.01)
    scaled.refused()
    assert scaled.scale == SCALE / 2
    compute.refused()  # nothing to scale
    assert compute.scale == 1.0
    for _ in range(100):
        scaled.refused()
    assert scaled.scale == 1.0


def test_an_overflow_in_float16_leaves_gradients_that_a_shard_refuses():
    model = nn.Linear(4, 1, bias=False)
    config = ComputeConfig(precision="float16")
    compute = Compute(model, total(100.0), config)
    compute.backward(compute.loss(torch.ones(1, 4), None))
    assert model.weight.grad is not None
    assert not bool(torch.isfinite(model.weight.grad).any())


COMPILED = """
import torch, warnings
from distbelief.workers.compute import Compute, ComputeConfig
from distbelief.workers.worker import loss_of
warnings.simplefilter("ignore")
found = []
for compile in (False, True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    compute = Compute(
        model, lambda outputs, targets: loss_of(model, outputs, targets),
        ComputeConfig(compile=compile),
    )
    for parameter in model.parameters():  # as Downpour does: values come from the shards' memory
        parameter.data = parameter.data.clone()
    for _ in range(2):
        model.zero_grad()
        loss = compute.loss(*compute.place(torch.ones(4, 6), torch.tensor([0, 1, 2, 0])))
        compute.backward(loss)
        for parameter in model.parameters():
            parameter.data = parameter.data - 0.1
    found.append([loss.detach(), *(p.grad for p in model.parameters())])
for plain, compiled in zip(*found, strict=True):
    assert torch.allclose(plain, compiled, rtol=1e-4, atol=1e-6), (plain, compiled)
print("the same")
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_model_gives_the_same_loss_and_gradients():
    """In a process of its own: the compiler keeps threads."""
    told = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert told.stdout.strip() == "the same", told.stderr


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="float8"):
        ComputeConfig(precision="float8")
    assert PRECISIONS["float32"] is None
