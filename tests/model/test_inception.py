"""The blocks on small maps: what each branch computes, and the order they are joined in."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.model.inception import (
    AuxiliaryHead,
    AuxiliaryShape,
    ConvShape,
    ConvUnit,
    Inception,
    NaiveInception,
    Widths,
)

WIDTHS = Widths(2, 3, 5, 4, 6, 7)


def images(channels: int, side: int = 9) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def convolve(unit: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(unit, ConvUnit)
    weight, bias = unit.conv.weight, unit.conv.bias
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2).clamp(min=0)


def test_reduced_module_joins_its_four_branches_in_the_order_of_table_1() -> None:
    net, x = Inception(8, WIDTHS), images(8)
    pooled = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 1)
    expected = [
        convolve(net["1x1"], x),
        convolve(net["3x3"], convolve(net["3x3_reduce"], x)),
        convolve(net["5x5"], convolve(net["5x5_reduce"], x)),
        convolve(net["pool_proj"], pooled),
    ]
    assert net(x).shape == (2, 2 + 5 + 6 + 7, 9, 9)
    torch.testing.assert_close(net(x), torch.cat(expected, 1))


def test_naive_module_joins_three_convolutions_and_the_pooled_input() -> None:
    net, x = NaiveInception(8, WIDTHS), images(8)
    expected = [convolve(net[name], x) for name in ("1x1", "3x3", "5x5")]
    expected.append(F.max_pool2d(x, 3, 1, 1))
    assert net(x).shape == (2, 2 + 5 + 6 + 8, 9, 9)
    torch.testing.assert_close(net(x), torch.cat(expected, 1))


@pytest.mark.parametrize("module", [Inception, NaiveInception])
def test_the_5x5_branch_has_5x5_kernels(module: type[Inception | NaiveInception]) -> None:
    unit = module(8, WIDTHS)["5x5"]
    assert isinstance(unit, ConvUnit)
    assert unit.conv.kernel_size == (5, 5)


@pytest.mark.parametrize("module", [Inception, NaiveInception])
def test_a_module_predicts_its_own_output_channels(
    module: type[Inception | NaiveInception],
) -> None:
    assert module.out_channels(8, WIDTHS) == module(8, WIDTHS)(images(8)).shape[1]


def test_every_convolution_is_rectified() -> None:
    net, x = Inception(8, WIDTHS), images(8)
    zeros = []
    for unit in net.values():
        unit.register_forward_hook(lambda _, __, y: zeros.append((y.min().item(), (y == 0).any())))
    net(x)
    assert len(zeros) == 6
    assert all(low == 0 and some for low, some in zeros)


def test_a_module_leaves_its_input_as_it_was() -> None:
    x = images(8)
    before = x.clone()
    Inception(8, WIDTHS)(x)
    assert torch.equal(x, before)


def test_batch_norm_takes_the_place_of_the_bias() -> None:
    unit, x = ConvUnit(ConvShape("3x3", 3, 8, 4), "batch"), images(8)
    assert unit.conv.bias is None
    y = F.conv2d(x, unit.conv.weight, padding=1)
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(unit(x), ((y - mean) / (var + 1e-3).sqrt()).clamp(min=0))


def test_auxiliary_head_pools_14x14_to_4x4_with_windows_of_5_at_0_3_6_9() -> None:
    head, x = AuxiliaryHead(AuxiliaryShape(8, 14, 3, 5, 2)), images(8, 14)
    pooled = head.pool(x)
    assert pooled.shape == (2, 8, 4, 4)
    torch.testing.assert_close(pooled[:, :, 1, 3], x[:, :, 3:8, 9:14].mean((2, 3)))


def test_auxiliary_head_is_pool_conv_fc_and_classifier() -> None:
    head, x = AuxiliaryHead(AuxiliaryShape(8, 14, 3, 5, 2)).eval(), images(8, 14)
    flat = convolve(head.conv, F.avg_pool2d(x, 5, 3)).reshape(2, 48)
    hidden = (flat @ head.fc.weight.T + head.fc.bias).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ head.classifier.weight.T + head.classifier.bias)


@pytest.mark.parametrize(("side", "pooled"), [(1, 1), (4, 1), (5, 1), (7, 1), (8, 2), (14, 4)])
def test_auxiliary_pool_is_global_below_5_pixels(side: int, pooled: int) -> None:
    shape = AuxiliaryShape(8, side, 3, 5, 2)
    head, x = AuxiliaryHead(shape), images(8, side)
    assert shape.pooled_size == pooled
    assert head.pool(x).shape == (2, 8, pooled, pooled)
    if side < 5:
        torch.testing.assert_close(head.pool(x)[:, :, 0, 0], x.mean((2, 3)))
    assert head(x).shape == (2, 2)
