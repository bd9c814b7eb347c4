"""Points in the plane: the three toy sets on which Haber & Ruthotto (2017) show stable networks.

Defined as in the authors' published code (Meganet: setupCircle, setupSwissRoll, setupPeaks), but drawn at
random everywhere, so that training, validation and test points are never the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twnn_plugin.errors import nearest

from ..errors import ConfigError

__all__ = ["PLANAR", "PlanarSet", "PlanarSplits", "peaks", "planar", "planar_label"]

_LOWEST, _HIGHEST = -6.5511333, 8.1062136
"""Range of :func:`peaks` on [-3, 3]^2; the five classes are levels of equal height between them."""


@dataclass(frozen=True)
class PlanarSet:
    """Points (N, 2) float32 and labels (N,) int64."""

    points: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PlanarSplits:
    """Independent draws of one set.

    Attributes:
        name: which set.
        classes: number of classes.
        box: half the side of the square around the points.
        train: to learn from.
        val: to choose settings with.
        test: to report.
    """

    name: str
    classes: int
    box: float
    train: PlanarSet
    val: PlanarSet
    test: PlanarSet


def peaks(x: Tensor, y: Tensor) -> Tensor:
    """MATLAB's function of that name, a sum of Gaussians times polynomials on [-3, 3]^2; shaped as given."""
    first = 3 * (1 - x) ** 2 * torch.exp(-(x**2) - (y + 1) ** 2)
    second = 10 * (x / 5 - x**3 - y**5) * torch.exp(-(x**2) - y**2)
    return first - second - torch.exp(-((x + 1) ** 2) - y**2) / 3


def planar_label(name: str, points: Tensor) -> Tensor:
    """The class of each point (N, 2) of the plane, (N,) int64; -1 where the set has no points.

    Raises:
        ConfigError: there is no such set.
    """
    _known(name)
    x, y = points.double().unbind(1)
    if name == "peaks":
        return _level(peaks(x, y))
    if name == "circles":
        r = (x.square() + (y / _FLAT).square()).sqrt()
        return torch.where(r <= 1, 0, torch.where(r <= 2, 1, -1))
    r = (x.square() + y.square()).sqrt()
    label = torch.full_like(r, -1, dtype=torch.int64)
    for index, inner in enumerate(_ARMS):
        # The arm passes an angle twice, half its length apart.
        turns = 2 * (r - inner)
        off = (torch.atan2(y, x) / (2 * math.pi) - turns + 0.5) % 1 - 0.5
        on = (off.abs() < 1e-4) & (turns >= -1e-6) & (turns <= 2 + 1e-6)
        label = torch.where(on, index, label)
    return label


_FLAT = 0.4  # the height of the ellipses, of their width
_ARMS = (0.0, 0.2)  # radii at which the arms of the roll begin; both go around twice and 1 outwards


def _circles(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An ellipse of half axes 1 and 0.4, and around it, touching it, one of twice the size."""
    labels = torch.arange(count) % 2
    r = _uniform(count, generator) + labels
    angle = 2 * math.pi * _uniform(count, generator)
    return torch.stack([r * angle.cos(), _FLAT * r * angle.sin()], dim=1), labels


def _swiss_roll(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two spirals of two turns, 0.2 apart."""
    labels = torch.arange(count) % 2
    t = _uniform(count, generator)
    r = t + torch.tensor(_ARMS, dtype=torch.float64)[labels]
    angle = 4 * math.pi * t
    return torch.stack([r * angle.cos(), r * angle.sin()], dim=1), labels


def _peaks(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five levels of :func:`peaks`, the same number of points from each."""
    labels = torch.arange(count) % 5
    points = torch.empty(count, 2, dtype=torch.float64)
    missing = torch.ones(count, dtype=torch.bool)
    while missing.any():
        drawn = 6 * torch.rand(4096, 2, generator=generator, dtype=torch.float64) - 3
        found = _level(peaks(drawn[:, 0], drawn[:, 1]))
        for label in range(5):
            places = torch.nonzero(missing & (labels == label)).flatten()
            mine = drawn[found == label][: len(places)]
            points[places[: len(mine)]] = mine
            missing[places[: len(mine)]] = False
    return points, labels


def _level(value: Tensor) -> Tensor:
    return (5 * (value - _LOWEST) / (_HIGHEST - _LOWEST)).floor().long().clamp(0, 4)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class _Spec:
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    classes: int
    box: float


_SPECS = {
    "circles": _Spec(_circles, 2, 2.1),
    "peaks": _Spec(_peaks, 5, 3.0),
    "swiss_roll": _Spec(_swiss_roll, 2, 1.3),
}
PLANAR = tuple(_SPECS)
"""The names of the sets."""


def planar(name: str, *, train: int = 1000, val: int = 1000, test: int = 4000, seed: int = 0) -> PlanarSplits:
    """Draw a set: the same points for the same arguments, each part from a generator of its own.

    Args:
        name: ``"circles"``, ``"peaks"`` or ``"swiss_roll"``.
        train: number of points to learn from, >= 1; classes take turns, so they are balanced.
        val: number of points to choose settings with, >= 1.
        test: number of points to report, >= 1.
        seed: >= 0.

    Raises:
        ConfigError: there is no such set, or a number out of range.
    """
    _known(name)
    for what, number, least in (("train", train, 1), ("val", val, 1), ("test", test, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ConfigError(f"{what} must be a whole number, at least {least}; got {number!r}.")
    spec = _SPECS[name]
    parts = []
    for index, count in enumerate((train, val, test)):
        points, labels = spec.draw(count, torch.Generator().manual_seed(3 * seed + index))
        parts.append(PlanarSet(points.float(), labels))
    return PlanarSplits(name, spec.classes, spec.box, *parts)


def _known(name: str) -> None:
    if name not in _SPECS:
        raise ConfigError(
            f"Unknown planar set {name!r}.{nearest(str(name), PLANAR)} Known: {', '.join(PLANAR)}."
        )
