"""One call of ``fix`` as the adjoints see it: the equation, its rows and its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solvers import Control, Outcome, Solver, solve
from ..state import Layout
from ..types import State

__all__ = ["Call", "Equation"]


class Equation:
    """``z = f(z, *context)`` for the rows that are still being solved (a ``Problem``).

    Rows may leave only if context was passed: a function without context may close over the
    batch, and then has no way to know which rows are left.
    """

    leave_share = 0.8

    def __init__(self, f: Callable[..., State], layout: Layout, context: Sequence[Tensor], size: int):
        self.f = f
        self.layout = layout
        self.context = tuple(context)
        self.size = size
        self.evaluations = 0
        self.can_leave = bool(context)

    def evaluate(self, z: Tensor) -> Tensor:
        rows = z.shape[0]
        self.evaluations += rows
        return self.layout.pack(self.f(self.layout.unpack(z), *self.context), rows)

    def keep(self, rows: Tensor) -> None:
        self.context = tuple(c.index_select(0, rows) for c in self.context)
        self.size = rows.numel()


@dataclass
class Call:
    """Everything ``fix`` was given, checked.

    Attributes:
        f: the map, of (state, *context).
        layout: how the state lies in the (B, D) matrix.
        z0: (B, D) the starting state.
        context: tensors with B rows each.
        solver: a solver instance.
        control: when a row is finished.
        settled: (B,) bool of rows for which ``f`` does not depend on the state, and ``z0`` is its value;
            they are not solved for, forward or backward, yet take part in the differentiated
            evaluation. None: no row is.
    """

    f: Callable[..., State]
    layout: Layout
    z0: Tensor
    context: tuple[Tensor, ...]
    solver: Solver
    control: Control
    settled: Tensor | None = None
    evaluations: int = 0

    def equation(self, rows: Tensor | None = None) -> Equation:
        """The equation of all rows, or of some."""
        context = self.context if rows is None else tuple(c.index_select(0, rows) for c in self.context)
        size = self.z0.shape[0] if rows is None else rows.numel()
        return Equation(self.f, self.layout, context, size)

    def solve(self) -> Outcome:
        """Solve for every row that is not settled, in the present grad mode."""
        rows = None
        if self.settled is not None and bool(self.settled.any()):
            rows = torch.nonzero(~self.settled).flatten()
        equation = self.equation(rows)
        outcome = solve(self.solver, equation, self.z0 if rows is None else self.z0[rows], self.control)
        self.evaluations += equation.evaluations
        return outcome if rows is None else self._spread(outcome, rows)

    def _spread(self, outcome: Outcome, rows: Tensor) -> Outcome:
        batch = self.z0.shape[0]
        return Outcome(
            self.z0.index_copy(0, rows, outcome.value),
            outcome.status.new_zeros(batch).index_copy(0, rows, outcome.status),
            outcome.steps.new_zeros(batch).index_copy(0, rows, outcome.steps),
            outcome.residual.new_zeros(batch).index_copy(0, rows, outcome.residual),
        )
