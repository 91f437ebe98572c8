"""Statistics: those of batch normalisation, taken anew for values that no worker had.

The shards' statistics are of the last values; an average of the values has others, and with the old
ones it can be worse than either (Izmailov et al. 2018, section 3.2).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from distbelief.workers.feed import move
from distbelief.workers.order import epoch_order
from distbelief.workers.pixels import normalise
from distbelief.workers.split import Split

SAMPLES = 4096
"""Of the training data, by which they are taken."""


def renew_statistics(model: nn.Module, split: Split, batch_size: int, seed: int) -> None:
    """Take the statistics of each BatchNorm by some training samples; without one, nothing.

    split: to train on, with its views. seed: of which samples.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    update_bn(_inputs(split, batch_size, seed, device), model)


def _inputs(split: Split, batch_size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    order = epoch_order(seed, 0, len(split))[:SAMPLES]
    for start in range(0, len(order), batch_size):
        read = split.samples.read(order[start : start + batch_size].tolist())
        if read.num_good > 1:
            yield move(normalise(read.inputs) if split.is_decoding else read.inputs, device)
