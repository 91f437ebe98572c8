"""Confusion: which classes a model takes for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distbelief.pictures import write_picture


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """One class of the test images; shares in [0, 1], None where there is nothing to divide by."""

    index: int
    name: str
    images: int
    recall: float | None
    """Of its images, those that were told right."""
    precision: float | None
    """Of the images that were told to be of it, those that are."""
    taken_for: str
    """The class that most of the others were told to be; empty where there are none."""
    taken_often: int


class Confusion:
    """Counts of (what it is, what it was told to be)."""

    def __init__(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        """names: of the classes; by default their numbers."""
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """[is, told]."""
        self.names = list(names) if names else [str(i) for i in range(num_classes)]

    def add(self, scores: Tensor, targets: Tensor) -> None:
        """scores: [B, classes], the highest of which counts. targets: int64 [B]."""
        size = len(self.counts)
        told = scores.argmax(1).cpu()
        is_one = (told < size) & (targets.cpu() < size)
        pairs = (targets.cpu() * size + told)[is_one]
        self.counts += torch.bincount(pairs, minlength=size * size).view(size, size)

    @property
    def rows(self) -> list[ClassRow]:
        """Each class, in their order."""
        found = []
        told = self.counts.sum(0)
        for index, name in enumerate(self.names):
            own = self.counts[index]
            right, images = int(own[index]), int(own.sum())
            others = own.clone()
            others[index] = 0
            most = int(others.argmax())
            often = int(others[most])
            found.append(
                ClassRow(
                    index=index,
                    name=name,
                    images=images,
                    recall=right / images if images else None,
                    precision=right / int(told[index]) if told[index] else None,
                    taken_for=self.names[most] if often else "",
                    taken_often=often,
                )
            )
        return found

    def draw(self, path: Path) -> None:
        """A PNG or SVG: rows are what it is, columns what it was told to be, shares of the row.

        Raises: Problem if matplotlib is not there or the file cannot be written.
        """
        shares = self.counts / self.counts.sum(1, keepdim=True).clamp_min(1)
        size, few = len(self.counts), len(self.counts) <= 40

        def onto(figure: object) -> None:
            axes = figure.subplots()  # type: ignore[attr-defined]  # matplotlib's, loaded late
            picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_xlabel("told")
            axes.set_ylabel("is")
            if few:
                axes.set_xticks(range(size), self.names, rotation=90)
                axes.set_yticks(range(size), self.names)
            if size <= 20:
                for i in range(size):
                    for j in range(size):
                        if share := float(shares[i, j]):
                            colour = "white" if share > 0.5 else "black"
                            text = f"{100 * share:.0f}"
                            axes.text(j, i, text, ha="center", va="center", color=colour, size=7)
            figure.colorbar(picture, label="share of the class's images")  # type: ignore[attr-defined]

        write_picture(path, onto, side=min(12.0, 4 + 0.22 * size))
