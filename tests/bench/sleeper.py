"""A network whose step takes a fixed time without the processors, as with a GPU at work.

PYTHONPATH=tests/bench distbelief launch --model sleeper:Sleeper
"""

import time

from torch import Tensor, nn

STEP_S = 0.1
HIDDEN = 256


class Sleeper(nn.Module):
    """135,000 parameters for the digits (16 x 16); sleeps `STEP_S` in each step of training."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, size, size] -> [n, classes]."""
        if self.training:
            time.sleep(STEP_S)
        logits: Tensor = self.layers(x)
        return logits
