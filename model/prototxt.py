"""Prototxt: GoogLeNet as Caffe's layers, the text of the net and its weights, for Caffe's readers.

For testing: without dropout and auxiliary heads, batch normalisation folded into the convolution
before it. The pixels are ours: RGB less the mean, by the deviation. Caffe pools in ceil mode, as
the network does. Layers with weights have the names that BVLC's file gives them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distbelief.model.googlenet import GoogLeNet
from distbelief.model.inception import ConvUnit, Inception, NaiveInception

Array = np.ndarray[Any, np.dtype[np.float32]]


class Layer(NamedTuple):
    """One layer of Caffe's."""

    name: str
    kind: str
    """Caffe's type."""
    bottoms: tuple[str, ...]
    top: str
    settings: str = ""
    """The layer's own parameters, as the prototxt has them."""
    arrays: tuple[Array, ...] = ()
    """Weight and bias."""


def layers_of(model: GoogLeNet) -> list[Layer]:
    """The network's layers from "data" to "prob", which are blobs of that name."""
    found: list[Layer] = []
    blob = "data"
    for name in model.table:
        child = model.get_submodule(name)
        for layer in _layers(name, child, blob):
            found.append(layer)
            blob = layer.top
    return [*found, Layer("prob", "Softmax", (blob,), "prob")]


def prototxt(name: str, layers: list[Layer], in_channels: int, image_size: int) -> str:
    """The text of a net, for images of that size, one at a time."""
    lines = [
        f'name: "{name}"',
        'layer { name: "data" type: "Input" top: "data" input_param { shape: '
        f"{{ dim: 1 dim: {in_channels} dim: {image_size} dim: {image_size} }} }} }}",
    ]
    for layer in layers:
        bottoms = "".join(f' bottom: "{blob}"' for blob in layer.bottoms)
        settings = f" {layer.settings}" if layer.settings else ""
        lines.append(
            f'layer {{ name: "{layer.name}" type: "{layer.kind}"{bottoms} top: "{layer.top}"'
            f"{settings} }}"
        )
    return "\n".join(lines) + "\n"


def _layers(name: str, child: nn.Module, blob: str) -> Iterator[Layer]:
    match child:
        case Inception():
            yield from _inception(name, child, blob)
        case NaiveInception():
            tops = []
            for part in ("1x1", "3x3", "5x5"):
                yield from _unit(f"{name}/{part}", child[part], blob)
                tops.append(f"{name}/{part}")
            yield _pool(f"{name}/pool", "MAX", 3, 1, 1, blob)
            yield _concat(name, (*tops, f"{name}/pool"))
        case nn.MaxPool2d():
            yield _pool(name, "MAX", 3, 2, 0, blob)
        case nn.AdaptiveAvgPool2d():
            settings = "pooling_param { pool: AVE global_pooling: true }"
            yield Layer(name, "Pooling", (blob,), name, settings)
        case nn.LocalResponseNorm():
            settings = (
                f"lrn_param {{ local_size: {child.size} alpha: {child.alpha} beta: {child.beta} "
                f"k: {child.k} }}"
            )
            yield Layer(name, "LRN", (blob,), name, settings)
        case nn.Sequential():
            for part, module in child.named_children():
                if isinstance(module, ConvUnit):
                    yield from _unit(f"{name}/{part}", module, blob)
                    blob = f"{name}/{part}"
                elif isinstance(module, nn.Conv2d):
                    yield _convolution(f"{name}/{part}", module, module.weight, module.bias, blob)
                    blob = f"{name}/{part}"
                elif isinstance(module, nn.Linear):
                    yield Layer(
                        f"{name}/{part}",
                        "InnerProduct",
                        (blob,),
                        f"{name}/{part}",
                        f"inner_product_param {{ num_output: {module.out_features} }}",
                        (_array(module.weight), _array(module.bias)),
                    )
        case _:
            raise AssertionError(f"{name} is a {type(child).__name__}")


def _inception(name: str, child: Inception, blob: str) -> Iterator[Layer]:
    yield from _unit(f"{name}/1x1", child["1x1"], blob)
    for part in ("3x3", "5x5"):
        yield from _unit(f"{name}/{part}_reduce", child[f"{part}_reduce"], blob)
        yield from _unit(f"{name}/{part}", child[part], f"{name}/{part}_reduce")
    yield _pool(f"{name}/pool", "MAX", 3, 1, 1, blob)
    yield from _unit(f"{name}/pool_proj", child["pool_proj"], f"{name}/pool")
    yield _concat(name, tuple(f"{name}/{part}" for part in ("1x1", "3x3", "5x5", "pool_proj")))


def _concat(name: str, blobs: tuple[str, ...]) -> Layer:
    return Layer(f"{name}/output", "Concat", blobs, f"{name}/output")


def _pool(name: str, kind: str, kernel: int, stride: int, pad: int, blob: str) -> Layer:
    settings = f"pooling_param {{ pool: {kind} kernel_size: {kernel} stride: {stride} pad: {pad} }}"
    return Layer(name, "Pooling", (blob,), name, settings)


def _unit(name: str, unit: nn.Module, blob: str) -> Iterator[Layer]:
    assert isinstance(unit, ConvUnit)
    weight: Tensor = unit.conv.weight
    bias = unit.conv.bias
    if (norm := unit.norm) is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            unit.conv.weight,
            bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    yield _convolution(name, unit.conv, weight, bias, blob)
    yield Layer(f"{name.rpartition('/')[0]}/relu_{name.rpartition('/')[2]}", "ReLU", (name,), name)


def _convolution(
    name: str, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, blob: str
) -> Layer:
    settings = (
        f"convolution_param {{ num_output: {conv.out_channels} kernel_size: {conv.kernel_size[0]} "
        f"stride: {conv.stride[0]} pad: {conv.kernel_size[0] // 2} group: {conv.groups}"
        f"{'' if bias is not None else ' bias_term: false'} }}"
    )
    arrays = (weight,) if bias is None else (weight, bias)
    return Layer(
        name, "Convolution", (blob,), name, settings, tuple(_array(array) for array in arrays)
    )


@torch.no_grad()
def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().contiguous().numpy()
    return array
