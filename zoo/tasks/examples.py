"""What the generators return, and how train, validation and test sets are kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twnn_plugin.errors import nearest

from ..errors import ConfigError

__all__ = ["SPLITS", "Examples", "collect", "fingerprints", "generator", "in_split", "joined"]

SPLITS = ("train", "val", "test")
_SHARES = 16  # of 16 fingerprints two are validation data and two are test data
_ROUND = 4096  # candidates that are looked at together, at most
_IN_VAIN = 1000  # candidates without one of the split: it has none


@dataclass(frozen=True)
class Examples:
    """Inputs with exact labels.

    Attributes:
        inputs: (N, ...) float32.
        targets: (N, ...) int64.
        difficulty: figures about each example by name, (N,) float32; what a solver's steps are held against.
        marks: (N, 1, H, W) int8, what may be told of an image in training beside its target, -1 where there
            is nothing to tell; None where a task has none.
        early: (N, ...) float32, the inputs without what the computation spreads from (pathfinder's dots), for
            trainings in which that comes late; None where a task has none.
    """

    inputs: Tensor
    targets: Tensor
    difficulty: dict[str, Tensor] = field(default_factory=dict)
    marks: Tensor | None = None
    early: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Examples:
        return Examples(
            self.inputs[rows],
            self.targets[rows],
            {name: value[rows] for name, value in self.difficulty.items()},
            None if self.marks is None else self.marks[rows],
            None if self.early is None else self.early[rows],
        )

    def to(self, device: torch.device | str) -> Examples:
        """All tensors but the difficulties, which stay, on a device."""
        marks, early = (None if it is None else it.to(device) for it in (self.marks, self.early))
        return Examples(self.inputs.to(device), self.targets.to(device), self.difficulty, marks, early)


def joined(first: Examples, second: Examples) -> Examples:
    """The examples of both, of the same shapes and difficulties; what one of them has not is left out."""
    marks, early = (
        None if one is None or two is None else torch.cat([one, two])
        for one, two in ((first.marks, second.marks), (first.early, second.early))
    )
    return Examples(
        torch.cat([first.inputs, second.inputs]),
        torch.cat([first.targets, second.targets]),
        {name: torch.cat([value, second.difficulty[name]]) for name, value in first.difficulty.items()},
        marks,
        early,
    )


def generator(seed: int, split: str, *about: int) -> np.random.Generator:
    """The random numbers of one set: a function of seed, split and whatever else tells sets apart.

    Raises:
        ConfigError: a split that does not exist, or a negative seed.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"Unknown split {split!r}.{nearest(str(split), SPLITS)} Splits: {', '.join(SPLITS)}."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number, at least 0; got {seed!r}.")
    return np.random.default_rng([seed, SPLITS.index(split), *about])


def fingerprints(content: np.ndarray) -> np.ndarray:
    """(N,) uint64, equal for equal rows of the (N, D) array of small whole numbers.

    A random linear form modulo 2^64 and a mix of its bits (Vigna's splitmix64): the same on every machine.
    """
    factors = np.random.default_rng(20210611).integers(0, 2**64, content.shape[1], dtype=np.uint64)
    x = (content.astype(np.uint64) * (factors | np.uint64(1))).sum(axis=1, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def in_split(content: np.ndarray, split: str) -> np.ndarray:
    """(N,) bool: rows of (N, D) that belong to the split. Each possible example belongs to exactly one."""
    share = fingerprints(content) % np.uint64(_SHARES)
    return share >= 4 if split == "train" else share // np.uint64(2) == SPLITS.index(split) - 1


def collect(
    count: int,
    split: str,
    draw: Callable[[int], tuple[np.ndarray, ...]],
    at_most: int = _ROUND,
) -> tuple[np.ndarray, ...]:
    """Draw until ``count`` examples of the split are found.

    Args:
        count: how many, >= 0.
        split: which.
        draw: ``draw(n)``: n candidates as arrays of n rows; the first one, flattened, is their content.
        at_most: candidates a draw.

    Raises:
        ConfigError: a negative count, or a split that none of the possible examples is in.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"count must be a whole number, at least 0; got {count!r}.")
    found: list[tuple[np.ndarray, ...]] = []
    missing, in_vain = count, 0
    while missing > 0 or not found:
        wanted = missing * (_SHARES // 12 + 1 if split == "train" else _SHARES // 2) + 1
        drawn = draw(min(wanted, at_most))
        keep = np.flatnonzero(in_split(drawn[0].reshape(len(drawn[0]), -1), split))[:missing]
        found.append(tuple(array[keep] for array in drawn))
        missing -= len(keep)
        in_vain = 0 if len(keep) else in_vain + len(drawn[0])
        if missing and in_vain > _IN_VAIN:
            raise ConfigError(
                f"So few different examples of this size exist that none is in the split {split!r}; take "
                "a larger size."
            )
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


def as_float(array: np.ndarray) -> Tensor:
    """A float32 tensor of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
