"""Ensemble: the mean of what several models say of several crops of an image.

Softmax probabilities are averaged, over the crops and over the models alike; the paper found the
maximum over crops worse. Source: Szegedy et al. 2014 section 7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distbelief.problem import Problem

CHUNK = 32
"""Images that a model is given at once: 144 crops of one would take gigabytes."""


class Ensemble(nn.Module):
    """Models of the same classes. Gives the logarithm of their mean probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble of no models")
        self.members = nn.ModuleList(models)

    def each(self, x: Tensor) -> Tensor:
        """What each model says of each image, the mean over its crops.

        x: images [B, C, H, W], or crops of them [B, crops, C, H, W]. Returns: probabilities,
        float64 [models, B, classes].
        Raises: Problem if a model gives no scores [images, classes].
        """
        images = x.flatten(0, 1) if x.ndim == 5 else x
        means: list[Tensor] = []
        for model in self.members:
            parts = []
            for some in [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]:
                scores = model(some)
                if not isinstance(scores, Tensor) or scores.ndim != 2:
                    raise Problem(
                        "DB-MODEL-005",
                        f"{type(model).__name__} gives no scores of shape [batch, classes]",
                        fix="evaluate it alone, without --crops and --with",
                    )
                parts.append(scores.double().softmax(1))
            means.append(torch.cat(parts).view(len(x), -1, parts[0].shape[1]).mean(1))
        return torch.stack(means)

    def forward(self, x: Tensor) -> Tensor:
        """x: as `each`. Returns: [B, classes], of which the softmax is the mean over the models."""
        return self.each(x).mean(0).log().float()
