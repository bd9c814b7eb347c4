"""What is known of every row while a batch is solved for, where compiled kernels can keep it."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from .. import kernels
from ..types import Iteration, Status
from .base import Control, Outcome, Problem
from .book import GROWTH, PATIENCE, still
from .measure import EPS, report_residual

__all__ = ["CODES", "BookRows", "fits", "rule_of"]

CODES = kernels.Codes(**{status.name: int(status) for status in Status})


def fits(z: Tensor, control: Control) -> bool:
    """Whether a solve from the (b, D) matrix ``z`` can be kept in a :class:`BookRows`."""
    plain = not control.coupled and control.seen is None
    return plain and kernels.takes(z)


def rule_of(control: Control, dtype: torch.dtype) -> kernels.Rule:
    """The stopping rule as the kernels take it."""
    return kernels.Rule(
        control.tol,
        control.stop == "rel",
        control.norm == "max",
        min(control.max_iter, sys.maxsize),
        EPS,
        GROWTH,
        still(dtype, control.coarse),
        PATIENCE,
        control.parts,
    )


class BookRows:
    """:class:`~twnn_plugin.solvers.book.Book` with the same rules, in one pass over the rows a step."""

    alive: None = None  # needed only where gradients are recorded

    def __init__(self, z: Tensor, control: Control):
        rule = rule_of(control, z.dtype)
        self.control, self.batch, self.unfinished = control, z.shape[0], z.shape[0]
        self._rows = kernels.Rows(z, rule, CODES, control.scale)
        self._value: Tensor | None = None  # of all rows, if they finish at once
        # Else (n, D) values and (n,) places: a whole matrix would be memory while the batch is largest.
        self._pieces: list[tuple[Tensor, Tensor]] = []

    def settle(
        self, k: int, z: Tensor, fz: Tensor, memory: Tensor | None, problem: Problem
    ) -> tuple[Tensor, bool]:
        """As :meth:`Book.settle <twnn_plugin.solvers.book.Book.settle>`."""
        rows, watched = self._rows, self.control.callback is not None
        r = torch.empty_like(z, memory_format=torch.contiguous_format) if memory is None else memory
        at, to = kernels.same(z, r), kernels.same(fz, r)
        before = rows.going == 1 if watched else None
        measured = z.new_empty((3, len(z))) if watched else None
        ended, newest = rows.look(at, to, r, measured)
        if before is not None and measured is not None:
            self._call_back(k, at, before, measured, problem)
        if ended == 0:
            return r, False
        self.unfinished -= ended
        if ended == self.batch and newest in (0, ended):  # all at once: it is there already
            self._value = to if newest else at
            return r, True
        self._pieces.append(rows.store(at, to, ended))
        return r, True

    def _call_back(self, k: int, z: Tensor, alive: Tensor, measured: Tensor, problem: Problem) -> None:
        control, places = self.control, self._rows.places[alive]
        callback = control.callback
        assert callback is not None
        if control.scale is not None:
            control = replace(control, scale=control.scale.detach()[places])
        change, size, _ = measured[:, alive].unbind()
        residual = report_residual(change, size, control)
        callback(Iteration(k, places, residual, problem.evaluations, z[alive]))

    def exhaust(self, fz: Tensor) -> None:
        """Nothing is left to write down: the last look has seen that it was the last."""

    def compact(self) -> Tensor:
        """Drop the finished rows; the indices of those that stay."""
        return self._rows.compact(self.unfinished)

    def outcome(self) -> Outcome:
        """The whole batch, in its order; every row must be finished."""
        rows = self._rows
        value = kernels.spread(self._pieces, self.batch) if self._value is None else self._value
        return Outcome(value, rows.status, rows.steps, rows.residual)
