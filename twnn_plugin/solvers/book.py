"""What is known of every row while a batch is solved for, and the values of the finished ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Iteration, Status
from .base import Control, Outcome, Problem
from .measure import Threshold, classify, measure, report_residual
from .memory import difference

__all__ = ["GROWTH", "PATIENCE", "Book", "joint_limit", "stagnated", "still"]

GROWTH = 1e6
"""A change this many times the first state and change is divergence, not a transient."""
PATIENCE = 10
"""Evaluations between looks for stagnation."""
_FLOOR = 64.0  # changes below this many ulps of the state cannot be told from rounding
_COARSE = 2.0  # the same in half precision, where 64 ulps are half of the state


def stagnated(change: Tensor, earlier: Tensor, size: Tensor, coarse: float = 0.0) -> Tensor:
    """(b,) bool: the change is at the rounding floor and no smaller than ``PATIENCE`` evaluations ago.

    Args:
        change: (b,) now.
        earlier: (b,) then.
        size: (b,) of the state.
        coarse: rounding error in half precision; see :class:`~twnn_plugin.solvers.base.Control`.
    """
    return (change > 0.9 * earlier) & (change <= still(change.dtype, coarse) * size)


def still(dtype: torch.dtype, coarse: float = 0.0) -> float:
    """The change, relative to the state, that cannot be told from rounding; see :func:`stagnated`."""
    return max(_FLOOR * torch.finfo(dtype).eps, _COARSE * coarse)


def joint_limit(limit: Tensor) -> Tensor:
    """(b,) the limit of coupled rows, from each one's own: the largest of a row that can be measured."""
    return limit.nan_to_num(0.0, 0.0).amax().expand_as(limit)


class _Piece(NamedTuple):
    """Rows that finished in one step: what they are and what was measured."""

    rows: Tensor  # (n,) indices in the original batch
    value: Tensor  # (n, D)
    measured: Tensor  # (3, n) change, size and bound
    stalled: Tensor | None  # (n,) bool; None: none of them
    step: int


class Book:
    """What is known of every row, and the values of the finished ones.

    A step costs two norms and a few operations on (b,) vectors. What can wait is put off: statuses
    and residuals are made once, when the last row is done.
    """

    def __init__(self, z: Tensor, control: Control):
        batch, device = z.shape[0], z.device
        if control.scale is not None and control.scale.requires_grad:
            control = replace(control, scale=control.scale.detach())
        self.control = self._asked = control
        self.threshold = Threshold(control, z)
        self.batch = batch
        self.unfinished = batch
        self.rows = torch.arange(batch, device=device)  # original index of each present row
        self.alive: Tensor | None = None  # (b,) present rows that are not finished; None: all
        self.limit: Tensor | None = None
        self.earlier: Tensor | None = None
        self.over: Tensor | None = None  # (b,) rows whose last change was beyond the limit
        self.stalled: Tensor | None = None
        self.pieces: list[_Piece] = []
        self._ran_out = False
        self._broken = False  # whether a number that is not finite was seen
        self._plain = control.callback is None and not control.coupled

    def settle(
        self, k: int, z: Tensor, fz: Tensor, memory: Tensor | None, problem: Problem
    ) -> tuple[Tensor, bool]:
        """Take in the k-th evaluation: the residual, and whether rows finished by it, which are written down.

        Args:
            k: evaluations so far.
            z: (b, D) the iterates.
            fz: (b, D) ``f(z)``.
            memory: (b, D) for the residual; None: new memory.
            problem: the equation.
        """
        r = difference(fz, z, memory)
        leaving = self.look(k, z, fz, r, problem)
        if leaving is not None:
            self.finish(leaving, k, z, fz)
        return r, leaving is not None

    def look(self, k: int, z: Tensor, fz: Tensor, r: Tensor, problem: Problem) -> Tensor | None:
        """(b,) bool of the rows that finish now, or None; keeps the measurements for ``finish``."""
        control = self.control
        if r.requires_grad:
            r, fz = r.detach(), fz.detach()
        if control.seen is not None:
            r = fz - control.seen.rounded(z.detach())
        change, size = measure(r, fz, control.norm, control.parts)
        bound = self.threshold(size)
        if self.limit is None:
            self.limit = GROWTH * (change + size)
            if control.coupled:  # a row that starts at rest may be set moving by another
                self.limit = joint_limit(self.limit)
        going_on = (change > bound).logical_and_(change < self.limit)  # false for NaN
        self.change, self.size, self.bound, self.stalled = change, size, bound, None
        # What nearly every step is: all rows go on, and nobody wants to know more.
        if self._plain and self.alive is None and k % PATIENCE and bool(going_on.all()):
            self.over = None
            return None
        return self._look_closer(k, z, problem)

    def _look_closer(self, k: int, z: Tensor, problem: Problem) -> Tensor | None:
        control, change = self.control, self.change
        assert self.limit is not None
        low = change < self.limit
        if bool(low.all()):
            self.over = None
        else:
            low = self._spare(low, change)
        going_on = (change > self.bound).logical_and_(low)
        if k % PATIENCE == 0:
            if self.earlier is not None:
                self.stalled = stagnated(change, self.earlier, self.size, control.coarse)
                going_on &= ~self.stalled
            self.earlier = change
        if control.callback is not None:
            self._call_back(k, z, problem)
        if control.coupled:
            self._couple(going_on)
        if self.alive is None:
            return None if bool(going_on.all()) else going_on.logical_not_()
        going_on.logical_and_(self.alive)
        return None if torch.equal(going_on, self.alive) else going_on.logical_xor_(self.alive)

    def _spare(self, low: Tensor, change: Tensor) -> Tensor:
        """An accelerated step may overshoot and the next plain one return: twice over is divergence."""
        over = (change < math.inf) ^ low
        spared = over if self.over is None else over > self.over
        self.over = over
        return low | spared

    def _couple(self, going_on: Tensor) -> None:
        # Coupled rows finish together: while any of them still moves, none is at its fixed point. Rows that
        # failed are gone, and hold up nobody.
        moving = going_on if self.alive is None else going_on & self.alive
        if bool(moving.any()):
            going_on.logical_or_(self.change <= self.bound)

    def _call_back(self, k: int, z: Tensor, problem: Problem) -> None:
        assert self.control.callback is not None
        pick = slice(None) if self.alive is None else self.alive
        residual = report_residual(self.change, self.size, self.control)[pick]
        rows, value = self.rows[pick], z.detach()[pick]
        if self.alive is None:  # else they are copies; the solve goes on with what lies here
            rows, value = rows.clone(), value.clone()
        self.control.callback(Iteration(k, rows, residual, problem.evaluations, value))

    def finish(self, leaving: Tensor, k: int, z: Tensor, fz: Tensor) -> None:
        """Write down the rows that leave."""
        local = torch.nonzero(leaving).squeeze(1)
        if local.numel() == self.rows.numel():
            rows, value, measured, stalled = self.rows, z, self._measured(), self.stalled
        else:
            rows = self.rows.index_select(0, local)
            value = z.index_select(0, local)
            measured = self._measured().index_select(1, local)
            stalled = None if self.stalled is None else self.stalled.index_select(0, local)
        # Summed, so that one number says whether a closer look is needed.
        if not math.isfinite(float(measured.sum())):  # NaN in, NaN out: the value is what f returned
            self._broken = True
            broken = classify(measured[0], measured[2]) == int(Status.non_finite)
            value = torch.where(broken[:, None], fz.index_select(0, local), value)
        self.pieces.append(_Piece(rows, value, measured, stalled, k))
        self.alive = ~leaving if self.alive is None else self.alive ^ leaving
        self._less(local.numel())

    def held(self, z: Tensor) -> Tensor:
        """The iterates (b, D), whose batch never shrank, with the rows that finished last at their values."""
        newest = self.pieces[-1]
        return z.detach().index_copy(0, newest.rows, newest.value.detach())

    def exhaust(self, fz: Tensor) -> None:
        """Write down the rows for which the evaluations ran out; their value is the newest state."""
        if self.alive is None:
            rows, value, measured = self.rows, fz, self._measured()
        else:
            local = torch.nonzero(self.alive).squeeze(1)
            rows, value = self.rows.index_select(0, local), fz.index_select(0, local)
            measured = self._measured().index_select(1, local)
        self.pieces.append(_Piece(rows, value, measured, None, self.control.max_iter))
        self._ran_out = True
        self._less(rows.numel())

    def _measured(self) -> Tensor:
        return torch.stack((self.change, self.size, self.bound.expand_as(self.change)))

    def compact(self) -> Tensor:
        """Drop the finished rows; the indices of those that stay."""
        assert self.alive is not None and self.limit is not None
        keep = torch.nonzero(self.alive).squeeze(1)
        self.rows, self.limit = self.rows.index_select(0, keep), self.limit.index_select(0, keep)
        self.alive = None
        if self.earlier is not None:
            self.earlier = self.earlier.index_select(0, keep)
        if self.over is not None:
            self.over = self.over.index_select(0, keep)
        if self.control.scale is not None:
            self.control = replace(self.control, scale=self.control.scale.index_select(0, keep))
            self.threshold = Threshold(self.control, self.limit)
        return keep

    def _less(self, rows: int) -> None:
        self.unfinished -= rows
        if self.unfinished == 0:
            self._close()

    def _close(self) -> None:
        """Statuses, steps and residuals of the whole batch, in its order."""
        pieces = self.pieces
        measured, self._order = pieces[0].measured, None
        self.steps = torch.full_like(pieces[0].rows, pieces[0].step)
        if len(pieces) > 1:
            self._order = torch.argsort(torch.cat([piece.rows for piece in pieces]))
            measured = torch.cat([piece.measured for piece in pieces], dim=1).index_select(1, self._order)
            steps = [torch.full_like(piece.rows, piece.step) for piece in pieces[1:]]
            self.steps = torch.cat([self.steps, *steps]).index_select(0, self._order)
        change, size, bound = measured.unbind()
        self.residual = report_residual(change, size, self._asked)
        if not self._broken and not self._ran_out and bool((change <= bound).all()):
            self.status = torch.zeros_like(self.steps)  # all converged
            return
        self.status = classify(change, bound)
        if any(piece.stalled is not None for piece in pieces):
            stalled = torch.cat([_stalled(piece) for piece in pieces])
            stalled = stalled if self._order is None else stalled.index_select(0, self._order)
            stalled = stalled & (self.status == int(Status.diverged))
            self.status = torch.where(stalled, int(Status.stagnated), self.status)
        if self._ran_out:
            self.status[pieces[-1].rows] = int(Status.max_iter)

    def outcome(self) -> Outcome:
        """The whole batch, in its order; every row must be finished."""
        value = self.pieces[0].value
        if self._order is not None:
            value = torch.cat([piece.value for piece in self.pieces]).index_select(0, self._order)
        return Outcome(value, self.status, self.steps, self.residual)


def _stalled(piece: _Piece) -> Tensor:
    return torch.zeros_like(piece.rows, dtype=torch.bool) if piece.stalled is None else piece.stalled
