"""Prefix sums modulo 2: the parity of every beginning of a string of bits."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import ConfigError
from .examples import Examples, as_float, collect, generator

__all__ = ["prefix_sums"]


def prefix_sums(bits: int, count: int, seed: int = 0, split: str = "train") -> Examples:
    """Uniformly random strings and the parity of each of their beginnings.

    The task of Schwarzschild et al. (2021). Up to 16 bits a set may hold repeats; a string is in one split
    alone at every length.

    Args:
        bits: length of the strings, >= 1.
        count: how many.
        seed: of the strings.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        Inputs (N, 1, bits) of 0 and 1, targets (N, bits); difficulty: ``ones``, the number of 1s, and
        ``run``, the length of the longest run of equal bits.

    Raises:
        ConfigError: an argument is out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 1:
        raise ConfigError(f"bits must be a whole number, at least 1; got {bits!r}.")
    random = generator(seed, split, 1, bits)
    at_most = max(1, 2**22 // bits)
    (strings,) = collect(
        count, split, lambda n: (random.integers(0, 2, (n, bits), dtype=np.int8),), min(at_most, 2**16)
    )
    targets = torch.from_numpy(strings.cumsum(axis=1, dtype=np.int64) & 1)
    difficulty = {"ones": as_float(strings.sum(axis=1)), "run": as_float(_longest_run(strings))}
    return Examples(as_float(strings[:, None]), targets, difficulty)


def _longest_run(strings: np.ndarray) -> np.ndarray:
    longest = np.ones(len(strings), dtype=np.int64)
    run = longest.copy()
    for place in range(1, strings.shape[1]):
        run = np.where(strings[:, place] == strings[:, place - 1], run + 1, 1)
        np.maximum(longest, run, out=longest)
    return longest
