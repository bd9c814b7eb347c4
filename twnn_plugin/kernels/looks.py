"""Looks of the compiled kernels at the rows of a solve."""

from __future__ import annotations

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from .switch import library, threads

__all__ = ["ABSOLUTE", "RELATIVE", "SCALED", "Codes", "Looks", "Rule", "widths"]

ABSOLUTE, RELATIVE, SCALED = range(3)
"""Kinds of stopping rules, as in rows.c."""
_MARKS = 4


class Rule(NamedTuple):
    """When a row is finished.

    Attributes:
        tol: the tolerance.
        relative: whether it is relative to the size of the state, plus ``floor``.
        largest: whether the change is the largest entry of the residual, against the rms of the state,
            instead of the Euclidean norms of both.
        most: evaluations of a row.
        floor: see ``relative``.
        growth: the change that counts as divergence, in units of the first change and size.
        still: a change below this share of the state cannot be told from rounding.
        patience: evaluations between looks for stagnation.
        parts: widths of parts of the state to measure apart, of which the one that is farthest from rest
            counts; () for the whole.
    """

    tol: float
    relative: bool
    largest: bool
    most: int
    floor: float
    growth: float
    still: float
    patience: int
    parts: tuple[int, ...] = ()


class Codes(NamedTuple):
    """Numbers that stand for the ways in which a row ends."""

    converged: int
    max_iter: int
    diverged: int
    non_finite: int
    stagnated: int


@functools.lru_cache(maxsize=64)
def widths(parts: tuple[int, ...]) -> array[int]:
    """The widths of parts as the kernels read them. No tensor: it would be taken for one that ``f`` uses."""
    return array("q", parts)


class Looks:
    """What is known of rows that are present, and where it is written down when they are finished.

    Args:
        like: a tensor of the dtype of the states, (b, D).
        rule: when a row is finished.
        codes: what to write down.
        rows: that can be present at a time, and places to write something down.
        scale: (rows,) what the tolerance is relative to instead; or None.

    Attributes:
        now: looks so far.
        status: (rows,) int64, by place.
        steps: (rows,) int64, by place.
        residual: (rows,), by place.
    """

    def __init__(self, like: Tensor, rule: Rule, codes: Codes, rows: int, scale: Tensor | None = None):
        self.rule, self.codes, self.now = rule, codes, 0
        self._parts = widths(rule.parts)
        self._stop = SCALED if scale is not None else RELATIVE if rule.relative else ABSOLUTE
        self._wide, self._width = like.dtype is torch.float64, like.shape[1]
        self._tiny = torch.finfo(like.dtype).tiny
        # The limit, the earlier change, whether the last one was over the limit, and the scale.
        self._marks = like.new_empty((rows, _MARKS))
        if scale is not None:
            self._marks[:, 3] = scale
        self._here = 0  # rows that are present, the first of each array
        self._going = like.new_empty(rows, dtype=torch.uint8)
        numbers = like.new_empty((4, rows), dtype=torch.int64)
        self._born, self._places, self.status, self.steps = numbers.unbind()
        self.residual = like.new_empty(rows)
        self._find()

    def _find(self) -> None:
        """Tell the kernels where the arrays are, once for many looks."""
        assert library is not None
        arrays = (self._marks, self._going, self._born, self._places, self.status, self.steps, self.residual)
        self._addresses = tuple(array.data_ptr() for array in arrays)
        rule = self.rule
        self._job = library.look_settings(
            self._wide,
            self._width,
            *self._addresses,
            rule.tol,
            rule.floor,
            rule.growth,
            rule.still,
            self._tiny,
            self._stop,
            rule.largest,
            rule.patience,
            rule.most,
            *self.codes,
            self._parts.buffer_info()[0],
            len(rule.parts),
        )

    def look(self, z: Tensor, fz: Tensor, r: Tensor, measured: Tensor | None = None) -> tuple[int, int]:
        """Measure the present rows after an evaluation, and write down those that are finished.

        Args:
            z: (b, D) the iterates, as ``same`` makes them.
            fz: (b, D) ``f(z)``, so too.
            r: (b, D) to be written: ``f(z) - z``.
            measured: (3, b) to be written: change, size and bound; or None.

        Returns:
            How many rows finished, and those among them whose value is the newest f(z): they ran out of
            evaluations or broke.
        """
        assert library is not None
        self.now += 1
        return library.look(
            self._job,
            threads(z),
            self.now,
            len(z),
            fz.data_ptr(),
            z.data_ptr(),
            r.data_ptr(),
            0 if measured is None else measured.data_ptr(),
        )
