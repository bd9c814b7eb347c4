"""What is known of every row while a batch is solved for, and the values of the finished ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..types import Iteration, Status
from .base import Control, Outcome, Problem
from .measure import classify, measure, report_residual, threshold

__all__ = ["Book"]

_GROWTH = 1e6  # a change this many times the first state is divergence, not a transient
_FLOOR = 64.0  # changes below this many ulps of the state cannot be told from rounding
_PATIENCE = 10  # evaluations between looks for stagnation


class Book:
    """What is known of every row, and the values of the finished ones."""

    def __init__(self, z: Tensor, control: Control):
        batch, device = z.shape[0], z.device
        self.control = control
        self.batch = batch
        self.unfinished = batch
        self.rows = torch.arange(batch, device=device)  # original index of each present row
        self.alive: Tensor | None = None  # (b,) present rows that are not finished; None: all
        self.status = torch.full((batch,), int(Status.max_iter), device=device)
        self.steps = torch.full((batch,), control.max_iter, device=device)
        self.residual = torch.full((batch,), float("nan"), device=device, dtype=z.dtype)
        self.limit: Tensor | None = None
        self.earlier: Tensor | None = None
        self.pieces: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def look(self, k: int, z: Tensor, fz: Tensor, r: Tensor, problem: Problem) -> Tensor | None:
        """(b,) bool of the rows that finish now, or None; keeps the measurements for ``finish``."""
        change, size = measure(r.detach(), fz.detach(), self.control.norm, self.control.parts)
        bound = threshold(size, self.control)
        if self.limit is None:
            self.limit = _GROWTH * (change + size)
            if self.control.coupled:  # a row that starts at rest may be set moving by another
                self.limit = self.limit.amax().expand_as(self.limit)
        going_on = (change > bound) & (change < self.limit)  # false for NaN
        stalled = None
        if k % _PATIENCE == 0:
            if self.earlier is not None:
                floor = _FLOOR * torch.finfo(change.dtype).eps * size
                stalled = (change > 0.9 * self.earlier) & (change <= floor)
                going_on &= ~stalled
            self.earlier = change
        self.change, self.size, self.bound, self.stalled = change, size, bound, stalled
        if self.control.callback is not None:
            self._call_back(k, z, problem)
        if self.control.coupled:
            self._couple(going_on)
        leaving = ~going_on if self.alive is None else self.alive & ~going_on
        return leaving if bool(leaving.any()) else None

    def _couple(self, going_on: Tensor) -> None:
        # Coupled rows finish together: while any of them still moves, none is at its fixed point.
        converging = going_on | (self.change <= self.bound)
        if bool(converging.all()) and bool(going_on.any()):
            going_on.fill_(True)

    def _call_back(self, k: int, z: Tensor, problem: Problem) -> None:
        assert self.control.callback is not None
        pick = slice(None) if self.alive is None else self.alive
        residual = report_residual(self.change, self.size, self.control)[pick]
        self.control.callback(Iteration(k, self.rows[pick], residual, problem.evaluations, z.detach()[pick]))

    def finish(self, leaving: Tensor, k: int, z: Tensor, fz: Tensor) -> None:
        """Write down the rows that leave."""
        everyone = self.alive is None and bool(leaving.all())
        local = torch.nonzero(leaving).flatten()
        rows = self.rows[local]
        bound = self.bound[local] if isinstance(self.bound, Tensor) else self.bound
        code = classify(self.change[local], bound)
        if self.stalled is not None:
            code = torch.where(
                self.stalled[local] & (code == int(Status.diverged)), int(Status.stagnated), code
            )
        self.status[rows] = code
        self.steps[rows] = k
        self.residual[rows] = report_residual(self.change, self.size, self.control)[local]
        value = z if everyone else z[local]
        broken = code == int(Status.non_finite)
        if bool(broken.any()):  # NaN in, NaN out: the value shows what f returned
            value = torch.where(broken[:, None], fz if everyone else fz[local], value)
        self.pieces.append((rows, value))
        self.alive = ~leaving if self.alive is None else self.alive & ~leaving
        self.unfinished -= local.numel()

    def exhaust(self, fz: Tensor) -> None:
        """Write down the rows for which the evaluations ran out; their value is the newest state."""
        local = slice(None) if self.alive is None else torch.nonzero(self.alive).flatten()
        rows = self.rows[local]
        self.residual[rows] = report_residual(self.change, self.size, self.control)[local]
        self.pieces.append((rows, fz[local]))
        self.unfinished = 0

    def compact(self) -> Tensor:
        """Drop the finished rows; the indices of those that stay."""
        assert self.alive is not None and self.limit is not None
        keep = torch.nonzero(self.alive).flatten()
        self.rows, self.limit, self.alive = self.rows[keep], self.limit[keep], None
        if self.earlier is not None:
            self.earlier = self.earlier[keep]
        if self.control.scale is not None:
            self.control = replace(self.control, scale=self.control.scale[keep])
        return keep

    def outcome(self) -> Outcome:
        """The whole batch, in its order."""
        if len(self.pieces) == 1 and self.pieces[0][0].numel() == self.batch:
            value = self.pieces[0][1]
        else:
            order = torch.cat([rows for rows, _ in self.pieces])
            value = torch.cat([piece for _, piece in self.pieces])[torch.argsort(order)]
        return Outcome(value, self.status, self.steps, self.residual)
