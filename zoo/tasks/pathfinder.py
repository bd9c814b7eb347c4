"""Pathfinder: are the two dots on one contour? Long contours of dashes among others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .examples import Examples, as_float, collect, generator

__all__ = ["LENGTHS", "Scene", "draw_scenes", "paint", "pathfinder"]

LENGTHS = (6, 9, 14)
_DISTRACTORS = 4
_STEP = 2.1 / 32  # between centres of dashes, in image sides
_APART = 2.7 / 32  # centres of dashes of different contours, at least
_DASH = 1.3 / 32
_THICK = 0.4 / 32
_DOT = 1.2 / 32
_MARGIN = 1.5 / 32
_TURNS = np.array([0.25] * 4 + [0.7] * 8)  # radians from one dash to the next, at most; tried in turn
_TRIES = 40


@dataclass(frozen=True)
class Scene:
    """Dashes before they are painted; coordinates in image sides.

    Attributes:
        centre: (N, D, 2) centres of all dashes: the two long contours, then the distractors.
        angle: (N, D) directions.
        contour: (D,) which contour a dash belongs to.
        dots: (N, 2) the dashes at which the dots are.
    """

    centre: np.ndarray
    angle: np.ndarray
    contour: np.ndarray
    dots: np.ndarray


def pathfinder(
    length: int = 14,
    count: int = 1,
    seed: int = 0,
    split: str = "train",
    pixels: int = 32,
    clutter: int | None = None,
) -> Examples:
    """Images with two long contours of dashes, shorter ones as clutter, and two dots.

    After Linsley et al. (2018): half of the images have both dots at the ends of one contour (label 1),
    the others at ends of two different ones (label 0). Contours neither cross nor touch.

    Args:
        length: dashes in a long contour, 2 to 14; the published sets have 6, 9 and 14.
        count: how many.
        seed: of the images.
        split: ``"train"``, ``"val"`` or ``"test"``.
        pixels: height and width, at least 32; the same scenes at any resolution.
        clutter: dashes in each of the short contours, 2 to 6; None: a third of ``length``, at least 2. Where
            several lengths are compared it is to be one number: else what is clutter changes with the length,
            and a network that has never seen three dashes in a row on a contour without a dot, except where
            the dots are joined, takes them for the answer.

    Returns:
        Inputs (N, 1, pixels, pixels) in [0, 1], targets (N,); difficulty: ``turning``, how far the
        contour of the first dot turns in all, in radians; marks: 0 on contours without a
        dot, 1 on those with one, and 2 on the dash at an end of these that has none; early: without the dots.

    Raises:
        ConfigError: an argument is out of range.
    """
    limits = [("length", length, 2, 14), ("pixels", pixels, 32, 1024)]
    if clutter is not None:
        limits.append(("clutter", clutter, 2, 6))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number, {low} to {high}; got {value!r}.")
    contour = _contours(length, clutter)
    random = generator(seed, split, 3, length)

    def draw(n: int) -> tuple[np.ndarray, ...]:
        scene = draw_scenes(length, n, random, clutter)
        content = np.concatenate([scene.centre.reshape(len(scene.dots), -1) * 4096, scene.dots], axis=1)
        return content.astype(np.int64), scene.centre, scene.angle, scene.dots

    _, centre, angle, dots = collect(count, split, draw, 1024)
    scene = Scene(centre, angle, contour, dots)
    first = dots[:, :1] // length * length + np.arange(length)
    turns = np.abs(np.diff(np.take_along_axis(angle, first, axis=1), axis=1)).sum(axis=1)
    targets = torch.from_numpy((dots[:, 0] // length == dots[:, 1] // length).astype(np.int64))
    early = paint(scene, pixels, np.ones(scene.angle.shape, dtype=bool))
    inputs = _dotted(early.clone(), scene)
    return Examples(inputs, targets, {"turning": as_float(turns)}, _marks(scene, length, pixels), early)


def _contours(length: int, clutter: int | None) -> np.ndarray:
    short = max(2, length // 3) if clutter is None else clutter
    return np.concatenate([np.repeat([0, 1], length), np.repeat(np.arange(2, 2 + _DISTRACTORS), short)])


def _marks(scene: Scene, length: int, pixels: int) -> Tensor:
    """(N, 1, pixels, pixels) int8; see :func:`pathfinder`. -1 where no dash is, or two of different kinds."""
    rows = np.arange(len(scene.dots))
    kind = (scene.contour[None, :, None] == scene.dots[:, None] // length).any(axis=2).astype(int)
    for dot in scene.dots.T:
        end = dot // length * length + (length - 1 - dot % length)  # the other end of its contour
        kind[rows, end] = np.where((scene.dots == end[:, None]).any(axis=1), 1, 2)
    there = torch.cat([paint(scene, pixels, kind == number) > 0.5 for number in range(3)], dim=1)
    number = there.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.where(there.sum(dim=1, keepdim=True) == 1, number, -1).to(torch.int8)


def draw_scenes(length: int, count: int, random: np.random.Generator, clutter: int | None = None) -> Scene:
    """``count`` scenes at most: those in which every contour found its place, at least one."""
    contour = _contours(length, clutter)
    total = len(contour)
    while True:
        centre = np.full((count, total, 2), 9.0)  # outside: not there yet
        angle = np.zeros((count, total))
        good = np.ones(count, dtype=bool)
        for number in range(contour[-1] + 1):
            good &= _grow(centre, angle, np.flatnonzero(contour == number), random)
        if good.any():
            break
    rows = np.flatnonzero(good)
    same = random.integers(0, 2, len(rows)).astype(bool)
    one, side = random.integers(0, 2, (2, len(rows)))
    first = one * length + side * (length - 1)
    other = np.where(same, one, 1 - one) * length
    second = other + np.where(same, 1 - side, random.integers(0, 2, len(rows))) * (length - 1)
    return Scene(centre[rows], angle[rows], contour, np.stack([first, second], axis=1))


def _grow(
    centre: np.ndarray, angle: np.ndarray, places: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Fill in one contour of every scene; (n,) bool, where that was possible."""
    done = np.zeros(len(centre), dtype=bool)
    for _ in range(_TRIES):
        rows = np.flatnonzero(~done)
        if not len(rows):
            break
        start, turned = _walk(centre[rows, : places[0]], len(places), random)
        whole = start[:, :, 0].max(axis=1) < 1
        done[rows[whole]] = True
        centre[rows[whole][:, None], places] = start[whole]
        angle[rows[whole][:, None], places] = turned[whole]
    return done


def _walk(others: np.ndarray, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A smooth walk in each scene that keeps away from the dashes there; what failed is outside."""
    count, options = len(others), len(_TURNS)
    walk = np.full((count, length, 2), 9.0)
    angle = np.zeros((count, length))
    rows = np.arange(count)
    for step in range(length):
        if step == 0:
            here = random.uniform(_MARGIN, 1 - _MARGIN, (count, options, 2))
            # Inwards, more or less: few walks that head for a border find a way along it.
            inwards = np.arctan2(0.5 - here[..., 1], 0.5 - here[..., 0])
            turned = inwards + random.uniform(-1.2, 1.2, (count, options))
        else:
            turned = angle[:, step - 1, None] + _TURNS * random.uniform(-1, 1, (count, options))
            middle = (turned + angle[:, step - 1, None]) / 2
            way = np.stack([np.cos(middle), np.sin(middle)], axis=-1)
            here = walk[:, step - 1, None] + _STEP * way
        fits = np.asarray(((here > _MARGIN) & (here < 1 - _MARGIN)).all(axis=2))
        known = np.concatenate([others, walk[:, : max(step - 1, 0)]], axis=1, dtype=np.float32)
        if known.shape[1]:
            dx, dy = (here[..., axis, None].astype(np.float32) - known[:, None, :, axis] for axis in (0, 1))
            fits = np.logical_and(fits, (dx * dx + dy * dy).min(axis=2) > _APART**2)
        best = fits.argmax(axis=1)
        ok = fits[rows, best]
        walk[:, step] = np.where(ok[:, None], here[rows, best], 9.0)
        angle[:, step] = turned[rows, best]
    whole = np.asarray((walk < 1).all(axis=(1, 2)))
    return np.where(whole[:, None, None], walk, 9.0), angle


def paint(scene: Scene, pixels: int, dashes: np.ndarray | None = None) -> Tensor:
    """Dashes and dots, with soft edges a pixel wide.

    Args:
        scene: what is painted.
        pixels: height and width.
        dashes: (N, D) bool: which of them are painted, and no dots; None: everything.

    Returns:
        (N, 1, pixels, pixels) in [0, 1].
    """
    image = torch.zeros(len(scene.dots), pixels * pixels)
    centre, angle = as_float(scene.centre), as_float(scene.angle)
    way = torch.stack([angle.cos(), angle.sin()], dim=-1)
    shown = None if dashes is None else torch.from_numpy(dashes)
    window = _window(_DASH / 2 + _THICK, pixels)
    for dash in range(centre.shape[1]):
        place, dx, dy = _around(centre[:, dash], window, pixels)
        cos, sin = way[:, dash, :1], way[:, dash, 1:]
        along = (dx * cos + dy * sin).abs() - _DASH / 2
        across = (dx * sin - dy * cos).abs()
        far = torch.hypot(along.clamp_min(0), across) - _THICK
        value = (0.5 - far * pixels).clamp(0, 1)
        value = value if shown is None else value * shown[:, dash, None]
        image.scatter_reduce_(1, place, value, "amax")
    image = image.view(-1, 1, pixels, pixels)
    return _dotted(image, scene) if shown is None else image


def _dotted(image: Tensor, scene: Scene) -> Tensor:
    """The image (N, 1, pixels, pixels) itself, with its dots."""
    pixels, flat, centre = image.shape[-1], image.flatten(1), as_float(scene.centre)
    rows, window = torch.arange(len(scene.dots)), _window(_DOT, pixels)
    for dot in torch.from_numpy(scene.dots.T):
        place, dx, dy = _around(centre[rows, dot], window, pixels)
        far = torch.hypot(dx, dy) - _DOT
        flat.scatter_reduce_(1, place, (0.5 - far * pixels).clamp(0, 1), "amax")
    return image


def _window(radius: float, pixels: int) -> Tensor:
    """(2, w) rows and columns, from the centre's, of the pixels that a thing of this radius may touch."""
    reach = int(np.ceil(radius * pixels + 0.5)) + 1
    steps = torch.arange(-reach, reach + 1)
    return torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)


def _around(centre: Tensor, window: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pixels around each of (N, 2) centres: number in the image and distances from it, (N, w) each.

    Those outside of the image are replaced by its border, which is as far from the centre or nearer.
    """
    x, y = ((centre[:, axis, None] * pixels).long() + window[1 - axis] for axis in (0, 1))
    x, y = x.clamp(0, pixels - 1), y.clamp(0, pixels - 1)
    dx, dy = ((at / pixels + 0.5 / pixels) - centre[:, axis, None] for axis, at in enumerate((x, y)))
    return y * pixels + x, dx, dy
