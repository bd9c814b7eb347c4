"""Pathfinder as a data set of images and classes, for the ordinary training and evaluation."""

from __future__ import annotations

import torch

from ..data import ArraySplit, DataSpec, DataSplits
from .examples import Examples
from .pathfinder import pathfinder

__all__ = ["pathfinder_splits"]


def pathfinder_splits(
    length: int = 14, train: int = 20_000, held_out: int = 2_000, seed: int = 0, pixels: int = 32
) -> DataSplits:
    """Pathfinder images in the three parts that :func:`zoo.train.train` takes.

    Args:
        length: dashes in a contour.
        train: training images.
        held_out: validation images, and as many test images.
        seed: of the images.
        pixels: height and width.
    """
    parts = [
        _split(pathfinder(length, count, seed, split, pixels))
        for split, count in (("train", train), ("val", held_out), ("test", held_out))
    ]
    # As they are: twnn eval draws the same images without this detour.
    spec = DataSpec("pathfinder", 2, 1, pixels, (0.0,), (1.0,), f"generated, contours of {length} dashes")
    return DataSplits(spec, *parts)


def _split(examples: Examples) -> ArraySplit:
    return ArraySplit((examples.inputs * 255).round().to(torch.uint8), examples.targets)
