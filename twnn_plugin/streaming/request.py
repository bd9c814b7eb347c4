"""A solve that waits for its rows, and what is known of the rows that are being solved for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.base import Control, Outcome, StepSolver
from ..solvers.book import GROWTH, PATIENCE, stagnated
from ..solvers.measure import Threshold, classify, measure, report_residual
from ..types import Status
from .modes import Modes

__all__ = ["Request", "Rows", "Verdict"]


@dataclass(eq=False)
class Request:
    """A solve that waits for its rows.

    Attributes:
        solver: its method.
        equation: its equation, with the context of all rows.
        z: (B, D) starting states.
        control: its stopping rule.
        modes: of the thread that it comes from.
        number: of the pass that it belongs to.
        entered: rows that have joined the active batch so far.
        missing: rows that are not done.
    """

    solver: StepSolver
    equation: Equation
    z: Tensor
    control: Control
    modes: Modes
    number: int
    entered: int = 0
    missing: int = field(init=False)
    _pieces: list[tuple[list[int], Tensor, Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.z.shape[0]

    def deliver(self, rows: list[int], value: Tensor, facts: Tensor) -> None:
        """Take in finished rows: their places in the batch, (n, D) values and (n, 3) facts."""
        self._pieces.append((rows, value, facts))
        self.missing -= len(rows)

    def outcome(self) -> Outcome:
        """The whole batch, in its order; every row must be done."""
        rows = [row for some, _, _ in self._pieces for row in some]
        places = torch.tensor(rows, dtype=torch.long, device=self.z.device)
        order = torch.argsort(places)
        value = torch.cat([value for _, value, _ in self._pieces]).index_select(0, order)
        facts = torch.cat([facts for _, _, facts in self._pieces]).index_select(0, order)
        status, steps, residual = facts.unbind(1)
        self.equation.evaluations += int(steps.sum())
        return Outcome(value, status.long(), steps.long(), residual.contiguous())


class Rows(NamedTuple):
    """What is known of the b rows in the active batch."""

    z: Tensor  # (b, D) the iterate; of a finished row, its value
    alive: Tensor  # (b,) bool: not finished
    age: Tensor  # (b,) evaluations while alive
    measured: Tensor  # (b, 3) change, size and bound, last measured while alive
    stalled: Tensor  # (b,) bool: finished by stagnation
    spent: Tensor  # (b,) bool: ran out of evaluations
    over: Tensor  # (b,) bool: the last change was beyond the limit
    limit: Tensor  # (b,) changes from which on a row has diverged
    earlier: Tensor  # (b,) change when stagnation was last looked for; NaN before

    @staticmethod
    def new(z: Tensor) -> Rows:
        """Rows that start at ``z``."""
        no = z.new_zeros(z.shape[0], dtype=torch.bool)
        zero = z.new_zeros(z.shape[0])
        return Rows(
            z, ~no, no.long(), z.new_zeros(len(no), 3), no, no, no, zero, torch.full_like(zero, math.nan)
        )

    def look(self, fz: Tensor, r: Tensor, control: Control, threshold: Threshold) -> tuple[Rows, Verdict]:
        """The rows with an evaluation measured, and who goes on.

        The rules are those of :class:`~twnn_plugin.solvers.book.Book`, with a count of evaluations for every
        row.
        """
        alive = self.alive
        if control.seen is not None:
            r = fz - control.seen.rounded(self.z)
        change, size = measure(r, fz, control.norm, control.parts)
        bound = threshold(size)
        age = self.age + alive
        limit = torch.where(age == 1, GROWTH * (change + size), self.limit)
        low = change < limit  # false for NaN
        over = (change < math.inf) ^ low
        # An accelerated step may overshoot and the next plain one return: twice over is divergence.
        going_on = alive & (change > bound) & (low | (over > self.over))
        due = age % PATIENCE == 0
        stuck = due & stagnated(change, self.earlier, size, control.coarse)
        going_on = going_on & ~stuck
        spent = going_on & (age >= control.max_iter)
        broken = alive & ~torch.isfinite(change + bound)  # their value is what f returned
        measured = torch.stack((change, size, bound.expand_as(change)), dim=1)
        rows = Rows(
            self.z,
            going_on & ~spent,
            age,
            torch.where(alive[:, None], measured, self.measured),
            self.stalled | (stuck & alive),
            self.spent | spent,
            over,
            limit,
            torch.where(due, change, self.earlier),
        )
        return rows, Verdict(rows.alive, broken | spent)

    def facts(self, rows: Tensor, control: Control) -> Tensor:
        """(n, 3) status, steps and residual of some rows."""
        change, size, bound = self.measured.index_select(0, rows).unbind(1)
        status = classify(change, bound)
        stalled = self.stalled.index_select(0, rows) & (status == int(Status.diverged))
        status = torch.where(stalled, int(Status.stagnated), status)
        status = torch.where(self.spent.index_select(0, rows), int(Status.max_iter), status)
        steps, residual = self.age.index_select(0, rows), report_residual(change, size, control)
        return torch.stack([status.to(change.dtype), steps.to(change.dtype), residual], dim=1)


class Verdict(NamedTuple):
    """What becomes of the rows after an evaluation, (b,) bool each."""

    goes_on: Tensor
    takes_f: Tensor  # of those that end: their value is f(z) rather than z

    def values(self, z: Tensor, fz: Tensor, following: Tensor) -> Tensor:
        """(b, D) the next iterate where a row goes on, its value where it ends."""
        ended = torch.where(self.takes_f[:, None], fz, z)
        return torch.where(self.goes_on[:, None], following, ended)
