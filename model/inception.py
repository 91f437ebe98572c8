"""The building blocks of GoogLeNet: conv unit, Inception module, auxiliary head.

Nothing here knows Table 1; `googlenet` does. Children are registered under the names that Caffe's
bvlc_googlenet gives its layers ("3x3_reduce", "pool_proj"), so a parameter's name says which layer
it is. Source: Szegedy et al., "Going Deeper with Convolutions", arXiv 1409.4842v1, sections 4, 5.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["lrn", "batch"]


class ConvShape(NamedTuple):
    """One convolution, padded so that stride 1 keeps the map's size: what is built and counted."""

    name: str
    kernel: int
    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1

    @property
    def num_weights(self) -> int:
        return self.kernel**2 * self.in_channels // self.groups * self.out_channels

    def build(self, *, bias: bool) -> nn.Conv2d:
        """A torch convolution of this shape, with torch's own initial values."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            padding=self.kernel // 2,
            groups=self.groups,
            bias=bias,
        )


class Widths(NamedTuple):
    """Output channels inside an Inception module, in the order of Table 1's columns."""

    n1x1: int
    n3x3_reduce: int
    n3x3: int
    n5x5_reduce: int
    n5x5: int
    pool_proj: int


class ConvUnit(nn.Module):
    """Convolution and ReLU: "all the convolutions [...] use rectified linear activation".

    norm="lrn": the convolution has a bias, as in the paper and in Caffe.
    norm="batch": batch normalisation between the two takes the bias's place (ours; the paper has
    none). Its eps is 1e-3, as in the public batch-normalised GoogLeNets.
    """

    def __init__(self, shape: ConvShape, norm: Norm = "lrn") -> None:
        super().__init__()
        self.conv = shape.build(bias=norm == "lrn")
        self.norm = nn.BatchNorm2d(shape.out_channels, eps=1e-3) if norm == "batch" else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride))."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x, inplace=True)


class Inception(nn.ModuleDict):
    """The module with dimension reductions: Figure 2(b), the one that GoogLeNet is made of."""

    depth = 2  # weighted layers on the longest path: Table 1's column

    def __init__(self, in_channels: int, widths: Widths, norm: Norm = "lrn") -> None:
        super().__init__({s.name: ConvUnit(s, norm) for s in self.convs(in_channels, widths)})

    @staticmethod
    def convs(in_channels: int, widths: Widths) -> tuple[ConvShape, ...]:
        """The six convolutions, by their Caffe names."""
        return (
            ConvShape("1x1", 1, in_channels, widths.n1x1),
            ConvShape("3x3_reduce", 1, in_channels, widths.n3x3_reduce),
            ConvShape("3x3", 3, widths.n3x3_reduce, widths.n3x3),
            ConvShape("5x5_reduce", 1, in_channels, widths.n5x5_reduce),
            ConvShape("5x5", 5, widths.n5x5_reduce, widths.n5x5),
            ConvShape("pool_proj", 1, in_channels, widths.pool_proj),
        )

    @staticmethod
    def out_channels(in_channels: int, widths: Widths) -> int:
        return widths.n1x1 + widths.n3x3 + widths.n5x5 + widths.pool_proj

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, n1x1 + n3x3 + n5x5 + pool_proj, H, W), in that order."""
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        branches = (
            self["1x1"](x),
            self["3x3"](self["3x3_reduce"](x)),
            self["5x5"](self["5x5_reduce"](x)),
            self["pool_proj"](pooled),
        )
        return torch.cat(branches, dim=1)


class NaiveInception(nn.ModuleDict):
    """The module without reductions: Figure 2(a).

    The pooled input joins the output with all its channels, so a stack of these gets wider at
    every module; that growth is the paper's reason for the reductions. The three columns of
    `Widths` that size the 1x1 reductions and the projection are not used.
    """

    depth = 1

    def __init__(self, in_channels: int, widths: Widths, norm: Norm = "lrn") -> None:
        super().__init__({s.name: ConvUnit(s, norm) for s in self.convs(in_channels, widths)})

    @staticmethod
    def convs(in_channels: int, widths: Widths) -> tuple[ConvShape, ...]:
        """The three convolutions, each on the module's whole input."""
        return (
            ConvShape("1x1", 1, in_channels, widths.n1x1),
            ConvShape("3x3", 3, in_channels, widths.n3x3),
            ConvShape("5x5", 5, in_channels, widths.n5x5),
        )

    @staticmethod
    def out_channels(in_channels: int, widths: Widths) -> int:
        return widths.n1x1 + widths.n3x3 + widths.n5x5 + in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, n1x1 + n3x3 + n5x5 + in, H, W), in that order."""
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat((self["1x1"](x), self["3x3"](x), self["5x5"](x), pooled), dim=1)


class AuxiliaryShape(NamedTuple):
    """The sizes of an auxiliary head on a (in_channels, in_size, in_size) map."""

    in_channels: int
    in_size: int
    conv_channels: int
    hidden: int
    num_classes: int

    @property
    def pooled_size(self) -> int:
        return (self.in_size - 5) // 3 + 1 if self.in_size >= 5 else 1

    @property
    def convs(self) -> tuple[ConvShape, ...]:
        """The three weighted layers; a fully-connected one is a 1x1 convolution on a 1x1 map."""
        flat = self.conv_channels * self.pooled_size**2
        return (
            ConvShape("conv", 1, self.in_channels, self.conv_channels),
            ConvShape("fc", 1, flat, self.hidden),
            ConvShape("classifier", 1, self.hidden, self.num_classes),
        )


class AuxiliaryHead(nn.Module):
    """Auxiliary classifier on a middle layer: section 5, the list after Table 1.

    Average pool 5x5/3 without padding, 1x1 convolution, fully-connected layer, dropout, linear.
    On 224x224 images the map is 14x14 and pools to 4x4. A map smaller than 5x5 has no 5x5 window:
    there the pool is an average over the whole map (ours, for small images).
    """

    def __init__(self, shape: AuxiliaryShape, norm: Norm = "lrn", dropout: float = 0.7) -> None:
        super().__init__()
        conv, fc, classifier = shape.convs
        self.pool = nn.AvgPool2d(5, 3) if shape.in_size >= 5 else nn.AdaptiveAvgPool2d(1)
        self.conv = ConvUnit(conv, norm)
        self.fc = nn.Linear(fc.in_channels, fc.out_channels)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(classifier.in_channels, classifier.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, S, S) -> logits (N, num_classes)."""
        x = self.conv(self.pool(x)).flatten(1)  # (N, conv_channels * pooled_size**2)
        x = self.dropout(F.relu(self.fc(x)))  # (N, hidden)
        return self.classifier(x)  # type: ignore[no-any-return]  # torch types a module's call as Any
