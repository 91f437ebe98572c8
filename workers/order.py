"""Order: in which order an epoch visits the data. Every process can work it out by itself."""

import torch
from torch import Tensor


def epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """The order in which an epoch visits the data: int64 [num_samples], a permutation.

    The same on every machine: it depends on nothing but the arguments.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)
