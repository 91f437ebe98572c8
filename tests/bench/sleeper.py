"""A network whose step takes a time that is known, without the processors, as with a GPU at work.

PYTHONPATH=tests/bench distbelief launch --model sleeper:Sleeper

SLEEPER_STEP_S, SLEEPER_NOISE (standard deviation of a lognormal distribution, as a share) and
SLEEPER_STRAGGLER (how many times as long the first worker takes) say otherwise.
"""

import os
import time
from random import Random

import torch
from torch import Tensor, nn

from distbelief.simulation.steps import Steps

STEP_S = float(os.environ.get("SLEEPER_STEP_S", "0.1"))
NOISE = float(os.environ.get("SLEEPER_NOISE", "0"))
STRAGGLER = float(os.environ.get("SLEEPER_STRAGGLER", "1"))
HIDDEN = 256
SEEDS_OF_FIRST = range(1_000_003, 1_000_003 + 1009)
"""Of torch in the first worker of a job with seed 0, by its incarnation: see process.py."""


class Sleeper(nn.Module):
    """135,000 parameters for the digits (16 x 16); sleeps in each step of training."""

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
        self._steps = Steps(STEP_S, NOISE)
        self._random: Random | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, size, size] -> [n, classes]."""
        if self.training:
            seed = torch.initial_seed()  # each worker has its own, once its model is made
            self._random = self._random or Random(seed)
            factor = STRAGGLER if seed in SEEDS_OF_FIRST else 1.0
            time.sleep(factor * self._steps.draw(self._random))
        logits: Tensor = self.layers(x)
        return logits
