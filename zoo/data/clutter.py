"""Images composed of those of a smaller set: items in clutter, and a mark that says which one counts.

After the digit clutter and digit debris of Spoerer, McClure & Kriegeskorte (2017, "Recurrent
convolutional neural networks: a better model of biological object recognition",
https://doi.org/10.3389/fpsyg.2017.01551): items lie among fragments of others, and pieces of them are
covered. What is added is the mark: a block at the left margin, level with one of the items, asks for the
class of that item. The items stand at any distance from the margin, so that whether a stroke counts cannot
be seen at the stroke: the answer has to come from elsewhere in the image, and the further the item, the
further it has to come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .specs import DataSpec
from .splits import ArraySplit, DataSplits

__all__ = ["COUNTS", "RECIPES", "Clutter", "ClutterSplit", "compose", "compose_splits"]

COUNTS = {"train": 20_000, "val": 4_000, "test": 8_000}
"""Images of each part, unless other numbers are asked for."""

_SEEDS = {"train": 1, "val": 2, "test": 3}  # not the seed of a run: runs share their data


@dataclass(frozen=True)
class Clutter:
    """How images are composed.

    Attributes:
        canvas: height and width of the image in pixels.
        bands: the image is cut into this many bands, one above the other, of at most one item each.
        items: least and largest number of items; each number is as frequent as the others.
        debris: least and largest number of fragments of other items.
        covers: least and largest number of dark blocks that hide what is under them.
        piece: height and width of fragments and covers, in pixels.
        mark: height and width of the mark, in pixels.
    """

    canvas: int = 20
    bands: int = 2
    items: tuple[int, int] = (1, 2)
    debris: tuple[int, int] = (0, 3)
    covers: tuple[int, int] = (0, 2)
    piece: int = 4
    mark: int = 3

    def __post_init__(self) -> None:
        self._require("bands", 1 <= self.bands <= self.canvas, f"from 1 to canvas={self.canvas}")
        for name, least in (("items", 1), ("debris", 0), ("covers", 0)):
            low, high = getattr(self, name)
            self._require(name, least <= low <= high, f"(low, high) with {least} <= low <= high")
        self._require("items", self.items[1] <= self.bands, f"at most one for each of {self.bands} bands")
        for name in ("piece", "mark"):
            self._require(name, 1 <= getattr(self, name) < self.canvas, f"from 1 to below {self.canvas}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(
                f"{name}={getattr(self, name)!r} of Clutter is not possible: expected {expected}."
            )


RECIPES: dict[str, Clutter] = {"cued_digits": Clutter()}
"""Recipes over scikit-learn's digits, by the name of the data set."""


@dataclass(frozen=True)
class ClutterSplit(ArraySplit):
    """Composed images, and what makes each hard.

    Attributes:
        items: (N,) int64, items in the image.
        debris: (N,) int64, fragments in it.
        hidden: (N,) float32, share of the wanted item's ink that is covered.
        distance: (N,) int64, pixels between the mark and the wanted item.
    """

    items: Tensor
    debris: Tensor
    hidden: Tensor
    distance: Tensor

    def subset(self, indices: Tensor) -> ClutterSplit:
        """The rows of ``indices``, in that order."""
        fields = (self.images, self.labels, self.items, self.debris, self.hidden, self.distance)
        return ClutterSplit(*(field[indices] for field in fields))


def compose_splits(
    spec: DataSpec, source: DataSplits, recipe: Clutter, counts: Mapping[str, int] = COUNTS
) -> DataSplits:
    """Train, validation and test images, each composed of the source images of that part alone.

    Args:
        spec: of the result.
        source: grey images in memory, cut.
        recipe: how to compose.
        counts: images of ``"train"``, ``"val"`` and ``"test"``.

    Raises:
        ConfigError: the source has no grey images in memory, or they do not fit the canvas.
    """
    parts = []
    for name, seed in _SEEDS.items():
        part = source.part(name)
        if not isinstance(part, ArraySplit):
            raise ConfigError(f"Clutter is composed of images in memory; {source.spec.name!r} is on disk.")
        parts.append(compose(part, recipe, counts[name], seed))
    return DataSplits(spec, *parts)


def compose(source: ArraySplit, recipe: Clutter, count: int, seed: int) -> ClutterSplit:
    """``count`` images, a function of the arguments alone.

    Args:
        source: (N, 1, H, W) grey images, bright on dark ground.
        recipe: how to compose.
        count: how many, at least 1.
        seed: of every choice.

    Returns:
        Images (count, 1, canvas, canvas), labels (count,), and what makes each hard.

    Raises:
        ConfigError: the source is not grey or not of a size that fits the recipe, or ``count`` is below 1.
        DataError: the source is empty.
    """
    channels, height, width = source.images.shape[1:]
    room = recipe.canvas // recipe.bands, recipe.canvas - recipe.mark
    least = max(recipe.piece, recipe.mark)
    if channels != 1 or height > room[0] or width > room[1] or min(height, width) < least:
        raise ConfigError(
            f"Clutter needs grey images from {least} pixels (piece, mark) to {room[0]}x{room[1]} (a band "
            f"beside the mark) in size; got {channels} channel(s) of {height}x{width}."
        )
    if count < 1:
        raise ConfigError(f"count={count!r} images cannot be composed: expected at least 1.")
    if not len(source):
        raise DataError("There are no images to compose clutter of.")
    return _Composer(source, recipe, count, seed).finish()


class _Composer:
    """All images at once: each layer is put into every image in one go."""

    def __init__(self, source: ArraySplit, recipe: Clutter, count: int, seed: int):
        self.recipe, self.count = recipe, count
        self.random = np.random.default_rng(seed)
        self.scans = source.images[:, 0].numpy()
        self.labels = source.labels.numpy()
        self.rows = np.arange(count)
        self.image = np.zeros((count, recipe.canvas, recipe.canvas), np.uint8)

    def finish(self) -> ClutterSplit:
        recipe = self.recipe
        items = self._number(recipe.items)
        wanted = self.random.integers(0, items)
        classes, corners = self._items(items)
        debris, side = self._number(recipe.debris), recipe.piece
        for index in range(recipe.debris[1]):
            piece = self._fragment() * (index < debris)[:, None, None]
            self._add(piece, self._anywhere(side))
        top, left = corners[self.rows, wanted].T
        before = self._ink(top, left)
        covers = self._number(recipe.covers)
        for index in range(recipe.covers[1]):
            window = self._window(self._anywhere(side), (side, side))
            self.image[window] *= (index >= covers)[:, None, None].astype(np.uint8)
        hidden = 1 - self._ink(top, left) / np.maximum(before, 1)
        height = self.scans.shape[1]
        full = np.full((self.count, recipe.mark, recipe.mark), 255, np.uint8)
        self._add(full, (top + (height - recipe.mark) // 2, np.zeros_like(top)))
        return ClutterSplit(
            torch.from_numpy(self.image[:, None]),
            torch.from_numpy(classes[self.rows, wanted]),
            torch.from_numpy(items),
            torch.from_numpy(debris),
            torch.from_numpy(hidden.astype(np.float32)),
            torch.from_numpy(left - recipe.mark),
        )

    def _items(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Put the items into bands of their own; their classes (N, K) and corners (N, K, 2)."""
        recipe, (height, width) = self.recipe, self.scans.shape[1:]
        most, band = recipe.items[1], recipe.canvas // recipe.bands
        bands = np.argsort(self.random.random((self.count, recipe.bands)), axis=1)
        classes = np.zeros((self.count, most), np.int64)
        corners = np.zeros((self.count, most, 2), np.int64)
        for index in range(most):
            chosen = self.random.integers(len(self.scans), size=self.count)
            top = bands[:, index] * band + self.random.integers(band - height + 1, size=self.count)
            left = self.random.integers(recipe.mark, recipe.canvas - width + 1, size=self.count)
            self._add(self.scans[chosen] * (index < items)[:, None, None], (top, left))
            classes[:, index] = self.labels[chosen]
            corners[:, index] = np.stack([top, left], axis=1)
        return classes, corners

    def _fragment(self) -> np.ndarray:
        """(N, piece, piece): a piece of some item for each image."""
        side = self.recipe.piece
        chosen = self.random.integers(len(self.scans), size=self.count)
        top, left = (self.random.integers(n - side + 1, size=self.count) for n in self.scans.shape[1:])
        _, down, right = self._window((top, left), (side, side))
        return self.scans[chosen[:, None, None], down, right]

    def _number(self, limits: tuple[int, int]) -> np.ndarray:
        return self.random.integers(limits[0], limits[1] + 1, self.count)

    def _anywhere(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """A place right of the margin for a square of this size in each image."""
        canvas, mark = self.recipe.canvas, self.recipe.mark
        top = self.random.integers(canvas - side + 1, size=self.count)
        return top, self.random.integers(min(mark, canvas - side), canvas - side + 1, size=self.count)

    def _window(
        self, corner: tuple[np.ndarray, np.ndarray], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Indices of a patch in each image, which broadcast to (N, height, width)."""
        down = corner[0][:, None, None] + np.arange(size[0])[None, :, None]
        return self.rows[:, None, None], down, corner[1][:, None, None] + np.arange(size[1])[None, None, :]

    def _add(self, patch: np.ndarray, corner: tuple[np.ndarray, np.ndarray]) -> None:
        """Lay a patch (N, h, w) over the images: the brighter shows."""
        window = self._window(corner, (patch.shape[1], patch.shape[2]))
        self.image[window] = np.maximum(self.image[window], patch)

    def _ink(self, top: np.ndarray, left: np.ndarray) -> np.ndarray:
        """(N,) brightness where the wanted item lies."""
        window = self._window((top, left), self.scans.shape[1:])
        return self.image[window].sum(axis=(1, 2), dtype=np.float64)
