"""The whole network: its counts against the paper's, its options, its outputs, its loss."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.model.googlenet import AUXILIARY, GoogLeNet, cost
from distbelief.model.inception import ConvUnit

# Table 1: output (channels, side) and operations in millions; "depth" is tested as a sum.
PAPER_OUTPUT = {
    "conv1": (64, 112),
    "pool1": (64, 56),
    "conv2": (192, 56),
    "pool2": (192, 28),
    "inception_3a": (256, 28),
    "inception_3b": (480, 28),
    "pool3": (480, 14),
    "inception_4a": (512, 14),
    "inception_4b": (512, 14),
    "inception_4c": (512, 14),
    "inception_4d": (528, 14),
    "inception_4e": (832, 14),
    "pool4": (832, 7),
    "inception_5a": (832, 7),
    "inception_5b": (1024, 7),
    "pool5": (1024, 1),
}
PAPER_OPS = {
    "conv2": 360,
    "inception_3a": 128,
    "inception_3b": 304,
    "inception_4b": 88,
    "inception_4c": 100,
    "inception_4d": 119,
    "inception_4e": 170,
    "inception_5b": 71,
    "loss3": 1,
}
MAIN_MULTIPLY_ADDS = 1_582_671_872

SMALL: dict[str, Any] = {"width": 0.125, "stem": "small", "image_size": 32, "in_channels": 1}


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def meta(**options: Any) -> GoogLeNet:
    """The real modules on torch's meta device: shapes and counts, but no arithmetic."""
    with torch.device("meta"):
        return GoogLeNet(**options)


def measure(net: GoogLeNet, x: Tensor) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Each row's output shape, weights and multiply-adds, from forward hooks on its modules."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    handles = [
        module.register_forward_hook(lambda m, _, y: shapes.update({m: tuple(y.shape[1:])}))
        for module in net.modules()
        if module is not net
    ]
    net(x, aux=net.has_aux)
    for handle in handles:
        handle.remove()
    rows = {}
    for name, row in net.named_children():
        layers = [m for m in row.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        areas = [math.prod(shapes[m][1:]) for m in layers]
        weights = [m.weight.numel() for m in layers]
        work = sum(w * a for w, a in zip(weights, areas, strict=True))
        rows[name] = (shapes[row], sum(weights), work)
    return rows


# --- counts -------------------------------------------------------------------------------------


def test_main_network_has_6998552_parameters():
    assert num_parameters(meta(aux=False)) == 6_998_552


def test_network_with_both_heads_has_13378280_parameters():
    assert num_parameters(meta()) == 13_378_280


def test_separable_conv1_has_2712_weights_and_34_million_operations():
    row = cost(conv1="separable")["conv1"]
    assert (row.weights, row.multiply_adds) == (2_712, 34_019_328)
    net = meta(conv1="separable", aux=False)
    layers = [m for m in net.get_submodule("conv1").modules() if isinstance(m, nn.Conv2d)]
    assert sum(layer.weight.numel() for layer in layers) == 2_712
    assert [layer.groups for layer in layers] == [3, 1]
    assert num_parameters(net) == 6_998_552 - 9_408 + 2_712


def test_depth_is_22_layers_and_27_with_the_pools():
    rows = {name: row for name, row in cost().items() if name not in AUXILIARY.values()}
    assert sum(row.depth for row in rows.values()) == 22
    assert sum(row.depth or name.startswith("pool") for name, row in rows.items()) == 27


def test_main_network_has_57_convolutions_and_one_linear_layer():
    layers = meta(aux=False).caffe_layers().values()
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == 57
    assert sum(isinstance(layer, nn.Linear) for layer in layers) == 1


def test_batch_norm_variant_has_7005832_parameters_and_14560_running_statistics():
    net = meta(aux=False, norm="batch")
    assert num_parameters(net) == 7_005_832
    assert sum(b.numel() for b in net.buffers() if b.ndim) == 14_560
    assert not any(isinstance(m, nn.LocalResponseNorm) for m in net.modules())
    assert all(unit.conv.bias is None for unit in net.modules() if isinstance(unit, ConvUnit))


def test_every_row_has_the_output_of_table_1():
    rows = measure(meta(), torch.empty(1, 3, 224, 224, device="meta"))
    measured = {name: shape for name, (shape, _, _) in rows.items()}
    for name, (channels, side) in PAPER_OUTPUT.items():
        assert measured[name] == (channels, side, side), name
    assert measured["loss3"] == measured["loss1"] == measured["loss2"] == (1000,)


def test_multiply_adds_are_those_of_the_papers_ops_column():
    rows = cost()
    assert {name: round(rows[name].multiply_adds / 1e6) for name in PAPER_OPS} == PAPER_OPS


def test_three_rows_differ_from_the_papers_ops_column():
    rows = cost()
    # Printed 34M: that is the separable convolution, not the 7x7 of the text and of Figure 3.
    assert rows["conv1"].multiply_adds == 118_013_952
    # Printed 73M: 73.6 with the decimals cut off.
    assert rows["inception_4a"].multiply_adds == 73_608_192
    # Printed 54M: what 48 channels of 5x5 reduction would cost (54.2M); the column says 32.
    assert rows["inception_5a"].multiply_adds == 51_079_168


def test_main_path_costs_1582671872_multiply_adds_and_1_5_billion_when_separable():
    main = [row for name, row in cost().items() if name not in AUXILIARY.values()]
    assert sum(row.multiply_adds for row in main) == MAIN_MULTIPLY_ADDS
    separable = MAIN_MULTIPLY_ADDS - 118_013_952 + 34_019_328
    rows = cost(conv1="separable")
    assert sum(rows[name].multiply_adds for name in rows if name not in AUXILIARY.values()) == (
        separable
    )
    assert separable == 1_498_677_248


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv1": "separable"},
        {"inception": "naive"},
        {"width": 0.3, "num_classes": 7},
        {"stem": "small", "image_size": 28, "in_channels": 1},
        {"stem": "small", "conv1": "separable", "image_size": 64},
        {"image_size": 32},
        {"image_size": 299},
    ],
    ids=str,
)
def test_costs_from_the_table_are_those_measured_on_the_modules(options: dict[str, Any]):
    net = meta(**options)
    size, channels = options.get("image_size", 224), options.get("in_channels", 3)
    measured = measure(net, torch.empty(1, channels, size, size, device="meta"))
    rows = cost(**options)
    assert list(rows) == list(measured)
    for name, (shape, weights, multiply_adds) in measured.items():
        row = rows[name]
        assert row.output == (*shape, 1, 1)[:3], name
        assert (row.weights, row.multiply_adds) == (weights, multiply_adds), name
    assert sum(row.params for row in rows.values()) == num_parameters(net)


# --- options ------------------------------------------------------------------------------------


def test_naive_modules_widen_at_every_module():
    rows = cost(inception="naive")
    widths = [row.output[0] for name, row in rows.items() if name.startswith("inception")]
    assert widths == [416, 832, 1280, 1728, 2176, 2640, 3344, 4048, 4944]
    assert rows["inception_5b"].multiply_adds > 10 * cost()["inception_5b"].multiply_adds


@pytest.mark.parametrize(
    ("size", "sides"), [(28, (7, 3, 1)), (32, (8, 4, 2)), (64, (16, 8, 4)), (16, (4, 2, 1))]
)
@pytest.mark.parametrize("norm", ["lrn", "batch"])
def test_small_stem_trains_on_small_images(size: int, sides: tuple[int, ...], norm: Any):
    net = GoogLeNet(10, **SMALL | {"image_size": size}, norm=norm)
    outputs = net(torch.randn(2, 1, size, size))
    assert [out.shape for out in outputs] == [(2, 10)] * 3
    net.loss(outputs, torch.tensor([3, 4])).backward()
    assert all(p.grad is not None for p in net.parameters())
    rows = cost(size, stem="small", in_channels=1)
    assert tuple(rows[f"inception_{n}"].output[1] for n in ("3a", "4a", "5a")) == sides


def test_imagenet_stem_works_on_32_pixels():
    net = GoogLeNet(10, width=0.125, image_size=32)
    assert [out.shape for out in net(torch.randn(2, 3, 32, 32))] == [(2, 10)] * 3
    rows = cost(32)
    assert [rows[f"inception_{n}"].output[1] for n in ("3a", "4a", "5a")] == [4, 2, 1]


def test_width_scales_every_layer_but_the_classes():
    layers = meta(width=0.25).caffe_layers()
    for name, layer in meta().caffe_layers().items():
        thin, full = layers[name].weight.shape[0], layer.weight.shape[0]
        assert thin == (full if name.endswith("/classifier") else full // 4), name


def test_width_leaves_at_least_one_channel():
    net = GoogLeNet(10, **SMALL | {"width": 0.001})
    assert net.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be .* got 0"),
        ({"num_classes": 2.5}, r"num_classes must be .* got 2\.5"),
        ({"in_channels": -1}, "in_channels must be .* got -1"),
        ({"image_size": 0}, "image_size must be .* got 0"),
        ({"image_size": 30}, "image_size 30 is too small for the imagenet stem: pool4"),
        ({"image_size": 15, "stem": "small"}, "image_size 15 is too small for the small stem"),
        ({"width": 0}, "width must be .* got 0"),
        ({"width": "half"}, "width must be .* got 'half'"),
        ({"width": float("nan")}, "width must be .* got nan"),
        ({"conv1": "7x7"}, "conv1 must be .* got '7x7'"),
        ({"stem": "tiny"}, "stem must be .* got 'tiny'"),
        ({"inception": "v3"}, "inception must be .* got 'v3'"),
        ({"norm": "none"}, "norm must be .* got 'none'"),
        ({"init": "he"}, "init must be .* got 'he'"),
        ({"dropout": 1.0}, r"dropout must be .* got 1\.0"),
        ({"aux_dropout": -0.1}, r"aux_dropout must be .* got -0\.1"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        meta(**options)


def test_cost_names_a_bad_argument_too():
    with pytest.raises(ValueError, match=r"stem must be .* got 'tiny'"):
        cost(stem="tiny")  # type: ignore[arg-type]  # that is the test


# --- initial values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "std"),
    [
        ("conv1/7x7_s2", 0.1),
        ("conv2/3x3_reduce", 0.1),
        ("conv2/3x3", 0.03),
        ("inception_4b/1x1", 0.03),
        ("inception_4b/3x3_reduce", 0.09),
        ("inception_4b/3x3", 0.03),
        ("inception_4b/5x5_reduce", 0.2),
        ("inception_4b/5x5", 0.03),
        ("inception_4b/pool_proj", 0.1),
        ("loss1/conv", 0.08),
        ("loss2/fc", 0.02),
        ("loss2/classifier", 1 / 1024),
        ("loss3/classifier", 1 / 1024),
    ],
)
def test_gaussian_weights_have_caffes_standard_deviation(
    reference: GoogLeNet, layer: str, std: float
):
    weight = reference.caffe_layers()[layer].weight
    # The standard error of a sample's deviation is std / sqrt(2 n); of its mean, std / sqrt(n).
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())


def test_xavier_weights_are_uniform_within_the_root_of_3_over_fan_in():
    net = GoogLeNet(10, **SMALL | {"width": 0.5, "init": "xavier"})
    for name, layer in net.caffe_layers().items():
        weight, bound = layer.weight, math.sqrt(3 / layer.weight[0].numel())
        assert weight.abs().max() <= bound, name
        # A uniform variable's deviation is bound / sqrt(3); its standard error is 0.45 of that.
        expected = pytest.approx(bound / math.sqrt(3), rel=4 * 0.45 / math.sqrt(weight.numel()))
        assert weight.std().item() == expected, name


@pytest.mark.parametrize("init", ["gaussian", "xavier"])
def test_biases_start_at_0_2_but_at_0_in_the_classifiers(init: Any):
    for name, layer in GoogLeNet(10, **SMALL, init=init).caffe_layers().items():
        assert layer.bias is not None
        expected = 0.0 if name.endswith("/classifier") else 0.2
        assert torch.equal(layer.bias, torch.full_like(layer.bias, expected)), name


def test_a_seed_gives_the_main_path_the_same_values_with_and_without_heads():
    torch.manual_seed(5)
    plain = GoogLeNet(10, **SMALL, aux=False).state_dict()
    torch.manual_seed(5)
    with_heads = GoogLeNet(10, **SMALL).state_dict()
    assert plain.keys() < with_heads.keys()
    assert all(torch.equal(value, with_heads[name]) for name, value in plain.items())


# --- outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> GoogLeNet:
    """The full-size network, on the CPU. Tests leave its parameters and its mode as they are."""
    torch.manual_seed(0)
    return GoogLeNet().eval()


def test_the_full_network_gives_three_outputs_in_training_and_one_in_evaluation(
    reference: GoogLeNet,
):
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        main = reference(x)
        three = reference(x, aux=True)
        training = reference.train()(x)
    reference.eval()
    assert main.shape == (1, 1000)
    assert [out.shape for out in three] == [(1, 1000)] * 3
    assert torch.equal(three[0], main)
    assert [out.shape for out in training] == [(1, 1000)] * 3


def test_a_network_without_heads_gives_the_main_logits_in_training():
    net = GoogLeNet(10, **SMALL, aux=False)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert not any(name.startswith(("loss1", "loss2")) for name, _ in net.named_parameters())


def test_heads_that_are_not_there_cannot_be_asked_for():
    net = GoogLeNet(10, **SMALL, aux=False)
    with pytest.raises(ValueError, match="built with aux=False"):
        net(torch.randn(2, 1, 32, 32), aux=True)


def test_heads_refuse_images_of_another_size_and_the_main_path_takes_them():
    net = GoogLeNet(10, **SMALL)
    with pytest.raises(ValueError, match=r"image_size 32, got images of shape \(2, 1, 40, 36\)"):
        net(torch.randn(2, 1, 40, 36))
    assert net(torch.randn(2, 1, 40, 36), aux=False).shape == (2, 10)


def test_heads_can_be_left_out_in_training():
    assert GoogLeNet(10, **SMALL)(torch.randn(2, 1, 32, 32), aux=False).shape == (2, 10)


def test_the_final_pool_is_7x7_at_224(reference: GoogLeNet):
    x = torch.randn(1, 1024, 7, 7)
    torch.testing.assert_close(reference.get_submodule("pool5")(x), F.avg_pool2d(x, 7))


def test_dropout_acts_in_training_only():
    net, x = GoogLeNet(10, **SMALL), torch.randn(2, 1, 32, 32)
    first, second = net(x), net(x)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    net.eval()
    first, second = net(x, aux=True), net(x, aux=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_is_40_percent_and_70_percent_in_the_heads():
    rates = {name: m.p for name, m in meta().named_modules() if isinstance(m, nn.Dropout)}
    assert rates == {"loss3.dropout": 0.4, "loss1.dropout": 0.7, "loss2.dropout": 0.7}


# --- loss ---------------------------------------------------------------------------------------


def test_total_loss_is_main_plus_0_3_of_both_heads():
    net, target = GoogLeNet(10, **SMALL), torch.tensor([1, 7])
    main, aux1, aux2 = outputs = (torch.randn(2, 10), torch.randn(2, 10), torch.randn(2, 10))

    def entropy(logits: Tensor) -> Tensor:
        return -(logits - logits.exp().sum(1, keepdim=True).log())[[0, 1], target].mean()

    total = entropy(main) + 0.3 * (entropy(aux1) + entropy(aux2))
    torch.testing.assert_close(net.loss(outputs, target), total)
    torch.testing.assert_close(net.loss(main, target), entropy(main))
    assert net.loss(outputs, target).shape == ()


def test_total_loss_sends_gradients_to_every_parameter_of_the_network():
    net = GoogLeNet(10, **SMALL)
    net.loss(net(torch.randn(4, 1, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    net = GoogLeNet(4, **SMALL, norm="batch", dropout=0.0, aux_dropout=0.0)
    x, target = torch.randn(8, 1, 32, 32), torch.arange(8) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = net.loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
