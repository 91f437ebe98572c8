"""GoogLeNet: Table 1 as data, the network built from it, its costs, and Caffe's weights.

The constants that the paper leaves out (local response normalisation, initial values, biases) are
those of Caffe's bvlc_googlenet; what is our own choice says "ours". Nothing here reads a disk.
Source: Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842v1, Table 1, Figure 3.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

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
    Norm,
    Widths,
)

Conv1 = Literal["plain", "separable"]
Stem = Literal["imagenet", "small"]
SMALLEST = {"imagenet": 31, "small": 16}
"""Smallest image in pixels that leaves every pool something to pool, by stem."""
Module = Literal["reduced", "naive"]
Init = Literal["gaussian", "xavier"]
Outputs = Tensor | tuple[Tensor, Tensor, Tensor]


class Convolution(NamedTuple):
    """Row "convolution"; `reduce` is the #3x3 reduce column, a 1x1 convolution before it."""

    name: str
    kernel: int
    stride: int
    channels: int
    reduce: int = 0


class MaxPool(NamedTuple):
    """Row "max pool", 3x3/2 in ceil mode without padding: 112 -> 56 -> 28 -> 14 -> 7."""

    name: str


class ResponseNorm(NamedTuple):
    """Local response normalisation: in Figure 3, though not in Table 1."""

    name: str


class Mixed(NamedTuple):
    """Row "inception"."""

    name: str
    widths: Widths


class AveragePool(NamedTuple):
    """Row "avg pool": 7x7 on the last map of a 224x224 image, in general the whole map."""

    name: str


class Linear(NamedTuple):
    """Rows "dropout" and "linear"."""

    name: str


Row = Convolution | MaxPool | ResponseNorm | Mixed | AveragePool | Linear

IMAGENET_STEM: tuple[Row, ...] = (
    Convolution("conv1", 7, 2, 64),
    MaxPool("pool1"),
    ResponseNorm("norm1"),
    Convolution("conv2", 3, 1, 192, reduce=64),
    ResponseNorm("norm2"),
    MaxPool("pool2"),
)

# Ours, for images of 28 to 64 pixels (16 is the least): the same rows, but conv1 is 3x3/1, so that
# inception_3a sees a quarter of the image's side and not an eighth: 8x8 for 32x32.
SMALL_STEM: tuple[Row, ...] = (Convolution("conv1", 3, 1, 64), *IMAGENET_STEM[1:])

BODY: tuple[Row, ...] = (
    #                             1x1  3x3r 3x3 5x5r 5x5  proj
    Mixed("inception_3a", Widths(64, 96, 128, 16, 32, 32)),
    Mixed("inception_3b", Widths(128, 128, 192, 32, 96, 64)),
    MaxPool("pool3"),
    Mixed("inception_4a", Widths(192, 96, 208, 16, 48, 64)),
    Mixed("inception_4b", Widths(160, 112, 224, 24, 64, 64)),
    Mixed("inception_4c", Widths(128, 128, 256, 24, 64, 64)),
    Mixed("inception_4d", Widths(112, 144, 288, 32, 64, 64)),
    Mixed("inception_4e", Widths(256, 160, 320, 32, 128, 128)),
    MaxPool("pool4"),
    Mixed("inception_5a", Widths(256, 160, 320, 32, 128, 128)),
    Mixed("inception_5b", Widths(384, 192, 384, 48, 128, 128)),
    AveragePool("pool5"),
    Linear("loss3"),
)

TABLE_1: tuple[Row, ...] = IMAGENET_STEM + BODY

# Which module feeds which auxiliary head, the head's two widths, and its weight in the total loss.
AUXILIARY = {"inception_4a": "loss1", "inception_4d": "loss2"}
AUXILIARY_CHANNELS = 128
AUXILIARY_HIDDEN = 1024
AUXILIARY_WEIGHT = 0.3

# conv1="separable": channels that the depthwise 7x7 makes of each input channel.
DEPTH_MULTIPLIER = 8

# Initial standard deviations, by Caffe layer. They stand in Caffe's train_val.prototxt up to commit
# 86758be93, where "xavier" had already made them idle. The main classifier has none there: ours,
# that of the auxiliary classifiers, which have as many inputs. The separable conv1 takes conv1's
# (ours). The values are for width 1 and are not rescaled at other widths.
GAUSSIAN_STD = {
    "conv1": 0.1,
    "conv2/3x3_reduce": 0.1,
    "conv2/3x3": 0.03,
    "inception/1x1": 0.03,
    "inception/3x3_reduce": 0.09,
    "inception/3x3": 0.03,
    "inception/5x5_reduce": 0.2,
    "inception/5x5": 0.03,
    "inception/pool_proj": 0.1,
    "aux/conv": 0.08,
    "aux/fc": 0.02,
    "classifier": 1 / 1024,
}


class Stage(NamedTuple):
    """A row with its numbers filled in. convs hold its weights; size is its output's side."""

    row: Row
    convs: tuple[ConvShape, ...]
    depth: int
    in_channels: int
    channels: int
    size: int


class Cost(NamedTuple):
    """What one row costs for one image. output: (channels, height, width).

    depth: weighted layers on the longest path, Table 1's column. A multiply-add counts once; those
    of biases, pools and normalisation are not counted, as in the paper's ops column.
    """

    output: tuple[int, int, int]
    depth: int
    weights: int
    biases: int
    multiply_adds: int

    @property
    def params(self) -> int:
        return self.weights + self.biases


def scaled(channels: int, width: float) -> int:
    """A channel count under the width multiplier, at least 1."""
    return max(1, round(channels * width))


def stages(
    image_size: int,
    in_channels: int,
    num_classes: int,
    *,
    width: float = 1.0,
    conv1: Conv1 = "plain",
    stem: Stem = "imagenet",
    inception: Module = "reduced",
) -> Iterator[Stage]:
    """Walk the table from the image to the logits.

    Raises: ValueError for an argument out of range, or where a map would vanish.
    """
    _check_counts(num_classes=num_classes, image_size=image_size, in_channels=in_channels)
    _check_choice("conv1", conv1, Conv1)
    _check_choice("stem", stem, Stem)
    _check_choice("inception", inception, Module)
    if not isinstance(width, int | float) or not 0 < width < math.inf:
        raise ValueError(f"width must be a positive number, got {width!r}")
    module = Inception if inception == "reduced" else NaiveInception
    channels, size = in_channels, image_size
    for row in (IMAGENET_STEM if stem == "imagenet" else SMALL_STEM) + BODY:
        convs: tuple[ConvShape, ...] = ()
        depth, inputs = 0, channels
        match row:
            case Convolution():
                convs = _convolutions(row, channels, width, conv1)
                depth, channels = len(convs), convs[-1].out_channels
                size = math.ceil(size / row.stride)
            case MaxPool():
                if size < 2:
                    raise ValueError(
                        f"image_size {image_size} is too small for the {stem} stem:"
                        f" {row.name} would get a {size}x{size} map; it takes images of"
                        f" {SMALLEST[stem]} pixels or more"
                    )
                size //= 2  # 3x3/2 in ceil mode, unpadded
            case Mixed():
                widths = Widths(*(scaled(n, width) for n in row.widths))
                convs, depth = module.convs(channels, widths), module.depth
                channels = module.out_channels(channels, widths)
            case AveragePool():
                size = 1
            case Linear():
                convs, depth = (ConvShape("classifier", 1, channels, num_classes),), 1
                channels = num_classes
            case ResponseNorm():
                pass
        yield Stage(row, convs, depth, inputs, channels, size)


def _convolutions(
    row: Convolution, in_channels: int, width: float, conv1: Conv1
) -> tuple[ConvShape, ...]:
    name = f"{row.kernel}x{row.kernel}" + (f"_s{row.stride}" if row.stride > 1 else "")
    channels = scaled(row.channels, width)
    if row.reduce:
        reduce = scaled(row.reduce, width)
        return (
            ConvShape(f"{name}_reduce", 1, in_channels, reduce),
            ConvShape(name, row.kernel, reduce, channels, row.stride),
        )
    if conv1 == "separable":
        middle = in_channels * DEPTH_MULTIPLIER
        depthwise = f"{name}_depthwise"
        return (
            ConvShape(depthwise, row.kernel, in_channels, middle, row.stride, groups=in_channels),
            ConvShape("1x1", 1, middle, channels),
        )
    return (ConvShape(name, row.kernel, in_channels, channels, row.stride),)


def _auxiliary(stage: Stage, num_classes: int, width: float) -> AuxiliaryShape:
    return AuxiliaryShape(
        stage.channels,
        stage.size,
        scaled(AUXILIARY_CHANNELS, width),
        scaled(AUXILIARY_HIDDEN, width),
        num_classes,
    )


def cost(
    image_size: int = 224,
    *,
    num_classes: int = 1000,
    width: float = 1.0,
    conv1: Conv1 = "plain",
    stem: Stem = "imagenet",
    inception: Module = "reduced",
    in_channels: int = 3,
) -> dict[str, Cost]:
    """The cost of each row by its name, from the table alone; nothing is built.

    The two auxiliary heads come last, as "loss1" and "loss2". The biases are those of norm="lrn"
    (a batch-normalised unit has twice as many parameters beside its weights).
    """
    rows: dict[str, Cost] = {}
    heads: dict[str, Cost] = {}
    for stage in stages(
        image_size,
        in_channels,
        num_classes,
        width=width,
        conv1=conv1,
        stem=stem,
        inception=inception,
    ):
        name, side = stage.row.name, stage.size
        rows[name] = Cost(
            (stage.channels, side, side),
            stage.depth,
            sum(conv.num_weights for conv in stage.convs),
            sum(conv.out_channels for conv in stage.convs if conv.groups == 1),
            # All of a row's convolutions end on maps of the row's output size.
            sum(conv.num_weights * side**2 for conv in stage.convs),
        )
        if name in AUXILIARY:
            head = _auxiliary(stage, num_classes, width)
            weights = [conv.num_weights for conv in head.convs]
            heads[AUXILIARY[name]] = Cost(
                (num_classes, 1, 1),
                len(head.convs),
                sum(weights),
                sum(conv.out_channels for conv in head.convs),
                weights[0] * head.pooled_size**2 + sum(weights[1:]),
            )
    return rows | heads


class GoogLeNet(nn.Module):
    """The network of Table 1; `GoogLeNet()` is the 1,000-class one with both auxiliary heads.

    num_classes: outputs of each classifier.
    width: factor on every channel count, rounded, at least 1 (ours; the table is width 1).
    aux: build the two auxiliary heads; the main path is the same without them.
    conv1: "plain" 7x7/2 as in the text, Figure 3 and Caffe; or "separable", a depthwise 7x7 with
        multiplier 8 and a 1x1, which alone explains Table 1's 2.7K parameters and 34M operations.
    stem: "imagenet" as in the table (images of 31 pixels or more), or "small" (ours: conv1 is
        3x3/1; 16 pixels or more).
    inception: "reduced", Figure 2(b); or "naive", Figure 2(a).
    norm: "lrn" as in the paper, with biases; or "batch": a batch normalisation in each conv unit,
        no conv biases and no local response normalisation (ours). Where the last map is one pixel
        (32 pixels with the imagenet stem), torch refuses to train on a batch of one image.
    init: "gaussian", Caffe's original standard deviations; or "xavier", Caffe's later
        uniform(-a, a) with a = sqrt(3 / fan_in). Biases: 0.2, but 0 in the classifiers.
    image_size: side of the square images. The auxiliary heads' fully-connected layer depends on
        it: they pool 5x5/3 (14x14 to 4x4 at 224), and where the map of inception_4a is smaller
        than 5x5 they average over the whole map. The final average is over the whole last map,
        which is the table's 7x7 at 224.
    in_channels: channels of the images.
    dropout, aux_dropout: probability of dropping before the main and the auxiliary classifiers.
    Raises: ValueError for an argument out of range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        aux: bool = True,
        conv1: Conv1 = "plain",
        stem: Stem = "imagenet",
        inception: Module = "reduced",
        norm: Norm = "lrn",
        init: Init = "gaussian",
        image_size: int = 224,
        in_channels: int = 3,
        dropout: float = 0.4,
        aux_dropout: float = 0.7,
    ) -> None:
        super().__init__()
        _check_choice("norm", norm, Norm)
        _check_choice("init", init, Init)
        _check_probabilities(dropout=dropout, aux_dropout=aux_dropout)
        self.image_size = image_size
        self.has_aux = aux
        # The layers draw values of their own, which init_ replaces. Kept off the random stream, and
        # with the heads last, a seed gives the main path the same values with and without heads.
        with torch.random.fork_rng(devices=[]):
            heads: dict[str, AuxiliaryHead] = {}
            for stage in stages(
                image_size,
                in_channels,
                num_classes,
                width=width,
                conv1=conv1,
                stem=stem,
                inception=inception,
            ):
                name = stage.row.name
                if isinstance(stage.row, ResponseNorm) and norm == "batch":
                    continue
                self.add_module(name, _build(stage, inception, norm, width, dropout))
                if aux and name in AUXILIARY:
                    shape = _auxiliary(stage, num_classes, width)
                    heads[AUXILIARY[name]] = AuxiliaryHead(shape, norm, aux_dropout)
            self.table = tuple(name for name, _ in self.named_children())  # the main path, in order
            for name, head in heads.items():
                self.add_module(name, head)
        self.init_(init)

    def forward(self, x: Tensor, aux: bool | None = None) -> Outputs:
        """Images (N, in_channels, H, W) -> logits (N, num_classes), or three of them.

        aux: True for (main, aux1, aux2), False for main only; by default True in training and
        False in evaluation, and always False for a network that has no heads. Without the heads
        the images may have any size and shape that the pools do not exhaust.
        Raises: ValueError if heads are asked for that are not there, or that do not fit the size.
        """
        wanted = self.has_aux and self.training if aux is None else aux
        if wanted and not self.has_aux:
            raise ValueError("aux=True, but this network was built with aux=False")
        if wanted and tuple(x.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"the auxiliary heads were built for image_size {self.image_size},"
                f" got images of shape {tuple(x.shape)}"
            )
        heads: list[Tensor] = []
        for name in self.table:
            x = self.get_submodule(name)(x)
            if name == "conv1" and x.device.type == "cpu":
                # On the CPU channels-last maps train about 1.6 times as fast; the layers keep the
                # format they are given. Not on the images: one channel has no format to tell.
                x = x.contiguous(memory_format=torch.channels_last)
            if wanted and name in AUXILIARY:
                heads.append(self.get_submodule(AUXILIARY[name])(x))
        return (x, heads[0], heads[1]) if wanted else x

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        """Total loss, a scalar: main + 0.3 (aux1 + aux2), each a mean cross-entropy.

        outputs: what forward gave, one tensor or three. target: class indices, (N,) int64.
        Source: section 5 ("discount weight 0.3").
        """
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, target)
        main, aux1, aux2 = (F.cross_entropy(logits, target) for logits in outputs)
        return main + AUXILIARY_WEIGHT * (aux1 + aux2)

    def caffe_layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """The modules that hold weights, by Caffe layer name, main path first.

        Caffe's "inception_3a/3x3_reduce" is the child inception_3a.3x3_reduce here. Layers that
        Caffe does not have are named in its manner: the separable conv1 is "conv1/7x7_s2_depthwise"
        and "conv1/1x1", the small stem's is "conv1/3x3".
        """
        return {
            name.removesuffix(".conv").replace(".", "/"): module
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }

    @torch.no_grad()
    def init_(self, init: Init) -> None:
        """Draw new weights and set the biases. Batch normalisation is left as it is."""
        for name, layer in self.caffe_layers().items():
            if init == "gaussian":
                layer.weight.normal_(0, _gaussian_std(name))
            else:
                bound = math.sqrt(3 / layer.weight[0].numel())
                layer.weight.uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.fill_(0.0 if name.endswith("/classifier") else 0.2)


def load_caffe(model: GoogLeNet, blobs: Mapping[str, Sequence[Any]]) -> None:
    """Copy Caffe's weights into the model, in place.

    blobs: {Caffe layer name: [weight, bias]}, arrays or tensors; leading axes of length 1 are
    dropped, so a fully-connected weight may be (out, in) or (1, 1, out, in). The layers of the
    auxiliary heads are ignored by a model without heads. Caffe's own images are BGR less the mean
    (104, 117, 123), in 0..255: the weights expect that.
    Raises: ValueError that names the layer, for missing or unknown layers and for shapes that do
    not fit; the model is then unchanged.
    """
    layers = model.caffe_layers()
    heads = () if model.has_aux else tuple(f"{head}/" for head in AUXILIARY.values())
    if missing := [name for name in layers if name not in blobs]:
        raise ValueError(f"missing layers: {', '.join(missing)}")
    if unknown := [n for n in blobs if n not in layers and not n.startswith(heads)]:
        raise ValueError(f"unknown layers: {', '.join(unknown)}")
    copies = [pair for name, layer in layers.items() for pair in _matched(name, layer, blobs[name])]
    with torch.no_grad():
        for parameter, value in copies:
            parameter.copy_(value)


def _matched(
    name: str, layer: nn.Conv2d | nn.Linear, blobs: Sequence[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of the layer with the value that it will get."""
    parameters = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    if len(blobs) != len(parameters):
        raise ValueError(f"{name}: the model has {list(parameters)}, got {len(blobs)} blobs")
    pairs: list[tuple[Tensor, Tensor]] = []
    for (kind, parameter), blob in zip(parameters.items(), blobs, strict=True):
        try:
            # torch.tensor copies, so that a read-only array draws no warning.
            value = blob.detach() if isinstance(blob, Tensor) else torch.tensor(blob)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {kind} is no array of numbers: {error}") from error
        shape = tuple(value.shape)
        while value.ndim > parameter.ndim and value.shape[0] == 1:
            value = value[0]
        if value.shape != parameter.shape:
            expected = tuple(parameter.shape)
            raise ValueError(f"{name}: {kind} has shape {shape}, the model's is {expected}")
        pairs.append((parameter, value))
    return pairs


def _build(stage: Stage, inception: Module, norm: Norm, width: float, dropout: float) -> nn.Module:
    match stage.row:
        case Convolution():
            # A depthwise convolution is half of a separable one: bias and ReLU come after the 1x1.
            return nn.Sequential(
                OrderedDict(
                    (
                        conv.name,
                        ConvUnit(conv, norm) if conv.groups == 1 else conv.build(bias=False),
                    )
                    for conv in stage.convs
                )
            )
        case MaxPool():
            return nn.MaxPool2d(3, 2, ceil_mode=True)
        case ResponseNorm():
            return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        case Mixed(_, widths):
            module = Inception if inception == "reduced" else NaiveInception
            return module(stage.in_channels, Widths(*(scaled(n, width) for n in widths)), norm)
        case AveragePool():
            return nn.AdaptiveAvgPool2d(1)
        case Linear():
            (linear,) = stage.convs
            return nn.Sequential(
                OrderedDict(
                    flatten=nn.Flatten(),
                    dropout=nn.Dropout(dropout),
                    classifier=nn.Linear(linear.in_channels, linear.out_channels),
                )
            )


def _gaussian_std(layer: str) -> float:
    block, part = layer.split("/")
    if block == "conv1":
        return GAUSSIAN_STD["conv1"]
    if part == "classifier":
        return GAUSSIAN_STD["classifier"]
    if block in AUXILIARY.values():
        block = "aux"
    return GAUSSIAN_STD[f"{block.split('_')[0]}/{part}"]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {value!r}")
