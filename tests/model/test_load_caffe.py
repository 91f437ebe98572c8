"""Loading Caffe's weights: the names, both layouts, and errors that change nothing."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from distbelief.model.googlenet import GoogLeNet, load_caffe

SMALL: dict[str, Any] = {"width": 0.125, "stem": "small", "image_size": 32, "in_channels": 1}


@pytest.fixture
def net() -> GoogLeNet:
    return GoogLeNet(10, **SMALL)


def blobs_for(net: GoogLeNet) -> dict[str, list[Any]]:
    rng = np.random.default_rng(1)
    return {
        name: [rng.standard_normal(p.shape, np.float32) for p in (layer.weight, layer.bias)]
        for name, layer in net.caffe_layers().items()
        if layer.bias is not None
    }


def refused(net: GoogLeNet, blobs: dict[str, list[Any]], message: str) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_caffe(net, blobs)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_layers_have_caffes_names():
    with torch.device("meta"):
        names = list(GoogLeNet().caffe_layers())
    parts = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
    modules = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
    assert names == [
        "conv1/7x7_s2",
        "conv2/3x3_reduce",
        "conv2/3x3",
        *(f"inception_{module}/{part}" for module in modules for part in parts),
        "loss3/classifier",
        *(f"{head}/{part}" for head in ("loss1", "loss2") for part in ("conv", "fc", "classifier")),
    ]


def test_a_layers_name_is_its_path_in_the_network(net: GoogLeNet):
    unit = net.get_submodule("inception_3a.3x3_reduce")
    assert net.caffe_layers()["inception_3a/3x3_reduce"] is unit.conv
    assert "inception_3a.3x3_reduce.conv.weight" in net.state_dict()


@pytest.mark.parametrize("convert", [lambda a: a, torch.from_numpy], ids=["arrays", "tensors"])
def test_every_value_arrives(net: GoogLeNet, convert: Any):
    blobs = blobs_for(net)
    load_caffe(net, {name: [convert(b) for b in pair] for name, pair in blobs.items()})
    for name, layer in net.caffe_layers().items():
        for parameter, blob in zip((layer.weight, layer.bias), blobs[name], strict=True):
            assert parameter is not None
            assert np.array_equal(parameter.detach().numpy(), blob), name


def test_fully_connected_weights_may_have_four_axes_and_arrays_may_be_read_only(net: GoogLeNet):
    blobs = blobs_for(net)
    weight, bias = blobs["loss3/classifier"]
    weight.flags.writeable = False
    blobs["loss3/classifier"] = [weight[None, None], bias[None, None, None]]
    load_caffe(net, blobs)
    loaded = net.caffe_layers()["loss3/classifier"].weight
    assert np.array_equal(loaded.detach().numpy(), weight)


def test_the_models_arrays_are_its_own(net: GoogLeNet):
    blobs = {n: [torch.from_numpy(b) for b in pair] for n, pair in blobs_for(net).items()}
    load_caffe(net, blobs)
    blobs["conv1/3x3"][0].zero_()
    assert net.caffe_layers()["conv1/3x3"].weight.abs().sum() > 0


def test_a_model_without_heads_needs_no_layers_for_them_and_ignores_those_it_gets(net: GoogLeNet):
    blobs = blobs_for(net)
    main = {name: pair for name, pair in blobs.items() if not name.startswith(("loss1", "loss2"))}
    for given in (blobs, main):
        bare = GoogLeNet(10, **SMALL, aux=False)
        load_caffe(bare, given)
        loaded = bare.caffe_layers()["conv2/3x3"].weight
        assert np.array_equal(loaded.detach().numpy(), blobs["conv2/3x3"][0])


def test_missing_layers_are_named(net: GoogLeNet):
    blobs = blobs_for(net)
    del blobs["inception_4c/pool_proj"], blobs["loss2/fc"]
    refused(net, blobs, "missing layers: inception_4c/pool_proj, loss2/fc")


def test_unknown_layers_are_named(net: GoogLeNet):
    refused(net, blobs_for(net) | {"fc8": []}, "unknown layers: fc8")


def test_a_wrong_weight_is_refused_with_both_shapes(net: GoogLeNet):
    blobs = blobs_for(net)
    blobs["loss3/classifier"][0] = np.zeros((1, 1, 9, 128), np.float32)
    refused(
        net,
        blobs,
        "loss3/classifier: weight has shape (1, 1, 9, 128), the model's is (10, 128)",
    )


def test_a_wrong_bias_is_refused_with_both_shapes(net: GoogLeNet):
    blobs = blobs_for(net)
    blobs["conv2/3x3"][1] = np.zeros(23, np.float32)
    refused(net, blobs, "conv2/3x3: bias has shape (23,), the model's is (24,)")


def test_a_transposed_or_broadcastable_weight_is_refused(net: GoogLeNet):
    blobs = blobs_for(net)
    blobs["loss1/classifier"][0] = blobs["loss1/classifier"][0].T
    refused(net, blobs, "loss1/classifier: weight has shape (128, 10), the model's is (10, 128)")
    blobs = blobs_for(net)
    blobs["loss1/fc"][1] = np.zeros(1, np.float32)
    refused(net, blobs, "loss1/fc: bias has shape (1,), the model's is (128,)")


def test_a_missing_bias_is_refused(net: GoogLeNet):
    blobs = blobs_for(net)
    blobs["conv2/3x3"].pop()
    refused(net, blobs, "conv2/3x3: the model has ['weight', 'bias'], got 1 blobs")


def test_values_that_are_no_numbers_are_refused_by_layer(net: GoogLeNet):
    blobs = blobs_for(net)
    blobs["conv2/3x3"][0] = "weights"
    refused(net, blobs, "conv2/3x3: weight is no array of numbers")


def test_a_batch_norm_model_has_no_place_for_a_convolutions_bias(net: GoogLeNet):
    normed = GoogLeNet(10, **SMALL, norm="batch")
    refused(normed, blobs_for(net), "conv1/3x3: the model has ['weight'], got 2 blobs")
