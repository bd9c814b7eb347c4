"""Perfect mazes with one path, in the units and the images of the deep-thinking benchmark."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .examples import Examples, as_float, collect, generator

__all__ = ["cells_of", "mazes", "pixels_of"]

# North, south, west, east.
_ROWS, _COLUMNS = np.array([-1, 1, 0, 0]), np.array([0, 0, -1, 1])
_OPPOSITE = np.array([1, 0, 3, 2])


def cells_of(size: int) -> int:
    """Cells along a side of a maze whose size is in the benchmark's units: 5 for 9, 30 for 59.

    Raises:
        ConfigError: not an odd number >= 3.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 3 or size % 2 == 0:
        raise ConfigError(
            f"The size of a maze counts cells and the walls between them: an odd number, at least 3, such as "
            f"9 (5x5 cells), 13, 33 or 59; got {size!r}."
        )
    return (size + 1) // 2


def pixels_of(size: int) -> int:
    """Height and width of the image: two pixels a unit and a border of three; 24 for 9."""
    return 4 * cells_of(size) + 4


def mazes(size: int, count: int, seed: int = 0, split: str = "train") -> Examples:
    """Mazes carved by a depth-first walk that begins at the start; the one path to the end is the label.

    As in the benchmark of Schwarzschild et al. (2021): walls are black, corridors white, the start
    green, the end red, both anywhere; the label covers the path's cells, both ends and the openings
    between them.

    Args:
        size: units along a side, cells and walls: 9, 13, 33, 59, 201, ...
        count: how many.
        seed: of the mazes.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        Inputs (N, 3, P, P) with values 0 and 1, targets (N, P, P), P = :func:`pixels_of`; difficulty, in
        cells: ``path``, the length of the path; ``dead_end``, how deep the deepest dead end is, seen from
        the path; ``reach``, the largest distance of any cell from the start or the end.

    Raises:
        ConfigError: an argument is out of range.
    """
    cells = cells_of(size)
    random = generator(seed, split, 2, size)
    at_most = max(1, 2**20 // cells**2)
    found = collect(count, split, lambda n: _draw(cells, n, random), min(at_most, 4096))
    _, ends, path, opened, length, dead_end, reach = found
    inputs, targets = _paint(cells, opened, path, ends)
    difficulty = {"path": as_float(length), "dead_end": as_float(dead_end), "reach": as_float(reach)}
    return Examples(inputs, targets, difficulty)


def _draw(cells: int, count: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Content, ends (n, 2), path (n, cells^2), openings (n, cells^2, 4), and three difficulties."""
    total = cells**2
    start = random.integers(0, total, count)
    end = (start + random.integers(1, total, count)) % total
    opened, parent, order = _carve(cells, start, random)
    rows = np.arange(count)
    path = np.zeros((count, total), dtype=bool)
    here = end.copy()
    while True:
        path[rows, here] = True
        if (here == start).all():
            break
        here = np.where(here == start, here, parent[rows, here])
    difficulty = _difficulty(path, parent, order, end)
    # A maze is known by its openings to the south and to the east and by its two ends.
    walls = opened[:, :, [1, 3]].reshape(count, -1)
    ends = np.stack([start, end], axis=1)
    content = np.concatenate([ends, np.packbits(walls, axis=1)], axis=1)
    return content, ends, path, opened, *difficulty


def _carve(
    cells: int, start: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A depth-first walk in every maze at once.

    Returns:
        Openings (n, cells^2, 4), the cell each was entered from (n, cells^2), and the cells in the order
        in which they were entered (n, cells^2).
    """
    count, total, side = len(start), cells**2, cells + 2
    rows = np.arange(count)
    steps = _ROWS * side + _COLUMNS
    # A margin of visited cells spares the tests for the border.
    visited = np.ones((side, side), dtype=bool)
    visited[1:-1, 1:-1] = False
    visited = np.tile(visited.reshape(-1), (count, 1))
    opened = np.zeros((count, side**2, 4), dtype=bool)
    parent = np.zeros((count, side**2), dtype=np.int64)
    order = np.zeros((count, total), dtype=np.int64)
    here = (start // cells + 1) * side + start % cells + 1
    visited[rows, here] = True
    order[:, 0] = parent[rows, here] = here
    entered = np.ones(count, dtype=np.int64)
    while True:
        free = ~visited[rows[:, None], here[:, None] + steps]
        number = free.sum(axis=1)
        go = number > 0
        # The k-th free direction, k uniform.
        wanted = (random.random(count) * number).astype(np.int64) + 1
        direction = (free.cumsum(axis=1) == wanted[:, None]).argmax(axis=1)
        there = here + steps[direction]
        r, h, t, d = rows[go], here[go], there[go], direction[go]
        opened[r, h, d] = opened[r, t, _OPPOSITE[d]] = True
        visited[r, t] = True
        parent[r, t] = h
        order[r, entered[go]] = t
        entered[go] += 1
        if (entered == total).all():
            break
        here = np.where(go, there, parent[rows, here])
    inside = (np.arange(cells)[:, None] + 1) * side + np.arange(cells) + 1
    inside = inside.reshape(-1)
    return opened[:, inside], _unpad(parent[:, inside], side, cells), _unpad(order, side, cells)


def _unpad(index: np.ndarray, side: int, cells: int) -> np.ndarray:
    return (index // side - 1) * cells + index % side - 1


def _difficulty(
    path: np.ndarray, parent: np.ndarray, order: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) each: length of the path, deepest dead end, largest distance from an end; in cells."""
    count, total = path.shape
    rows = np.arange(count)
    depth = np.zeros((count, total), dtype=np.int64)
    joins = np.zeros((count, total), dtype=np.int64)  # depth at which the way to a cell leaves the path
    for number in range(1, total):
        cell = order[:, number]
        above = parent[rows, cell]
        depth[rows, cell] = depth[rows, above] + 1
        joins[rows, cell] = np.where(path[rows, cell], depth[rows, cell], joins[rows, above])
    length = depth[rows, end]
    aside = depth - joins
    reach = np.maximum(depth.max(axis=1), (length[:, None] - joins + aside).max(axis=1))
    return length, aside.max(axis=1), reach


def _paint(cells: int, opened: np.ndarray, path: np.ndarray, ends: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images (N, 3, P, P) and labels (N, P, P)."""
    count, units = len(path), 2 * cells + 1
    rows = np.arange(count)
    grid, label = np.zeros((2, count, units, units), dtype=np.float32)
    on = path.reshape(count, cells, cells)
    south = opened[:, :, 1].reshape(count, cells, cells)
    east = opened[:, :, 3].reshape(count, cells, cells)
    grid[:, 1::2, 1::2] = 1
    grid[:, 2::2, 1::2] = south
    grid[:, 1::2, 2::2] = east
    label[:, 1::2, 1::2] = on
    # In a tree two neighbours on the path are joined by it if there is an opening between them.
    label[:, 2:-1:2, 1::2] = south[:, :-1] & on[:, :-1] & on[:, 1:]
    label[:, 1::2, 2:-1:2] = east[:, :, :-1] & on[:, :, :-1] & on[:, :, 1:]
    image = np.repeat(grid[:, None], 3, axis=1)
    for channel, place in ((1, ends[:, 0]), (0, ends[:, 1])):  # the start is green, the end red
        where = rows, slice(None), 2 * (place // cells) + 1, 2 * (place % cells) + 1
        image[where] = 0
        image[rows, channel, where[2], where[3]] = 1
    return _enlarge(image), _enlarge(label).long()


def _enlarge(units: np.ndarray) -> Tensor:
    """Two pixels a unit and one more pixel around."""
    twice = torch.from_numpy(units).repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    return torch.nn.functional.pad(twice, (1, 1, 1, 1))
