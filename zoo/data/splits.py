"""Train, validation and test parts of a data set, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import DataError
from .specs import DataSpec

__all__ = ["ArraySplit", "DataSplits", "ImageSplit", "Split", "hold_out"]


class Split(Protocol):
    """One part of a data set: labels at hand, images on request."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 class indices."""
        ...

    def __len__(self) -> int: ...

    def pil(self, index: int) -> Any:
        """Image ``index`` as a PIL image, for timm's transforms."""
        ...

    def subset(self, indices: Tensor) -> Split:
        """The rows of ``indices``, in that order."""
        ...


@dataclass(frozen=True)
class ArraySplit:
    """Images held in memory.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Any:
        """Image ``index`` as a PIL image of mode L or RGB."""
        from PIL import Image

        pixels = self.images[index].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def subset(self, indices: Tensor) -> ArraySplit:
        """The rows of ``indices``, in that order."""
        return ArraySplit(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageSplit:
    """Images that stay on disk and are decoded when asked for.

    Attributes:
        read: maps an index of the whole reader to a PIL image.
        indices: (N,) which images of the reader belong to this part.
        labels: (N,) int64.
    """

    read: Callable[[int], Any]
    indices: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, index: int) -> Any:
        """Image ``index`` of this part as a PIL image."""
        return self.read(int(self.indices[index]))

    def subset(self, indices: Tensor) -> ImageSplit:
        """The rows of ``indices``, in that order."""
        return ImageSplit(self.read, self.indices[indices], self.labels[indices])


@dataclass(frozen=True)
class DataSplits:
    """A data set, cut. Choices are made on ``val``; ``test`` is for the figure that is reported."""

    spec: DataSpec
    train: Split
    val: Split
    test: Split

    def part(self, name: str) -> Split:
        """``"train"``, ``"val"`` or ``"test"``."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut rows in two, every class in the same proportion.

    Args:
        labels: (N,) class indices.
        fraction: share of each class to hold out, in (0, 1); at least one row of a class that has two.
        seed: the cut is a function of the labels, the fraction and this number only.

    Returns:
        Indices (kept,) and (held out,), both ascending; neither is empty.

    Raises:
        DataError: no class has two rows, so that one of the parts would be empty.
    """
    if not len(labels) or int(labels.unique(return_counts=True)[1].max()) < 2:
        raise DataError(
            f"Nothing can be held out of {len(labels)} row(s): it takes a class with at least two of them."
        )
    generator = torch.Generator().manual_seed(seed)
    held = []
    for label in labels.unique():
        rows = torch.nonzero(labels == label).flatten()
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    out = torch.cat(held).sort().values
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[out] = False
    return torch.nonzero(kept).flatten(), out
