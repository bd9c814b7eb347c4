"""The loop of every step solver: tests, budget, rows that leave, statuses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..trees import rebuild
from .base import Control, Outcome, Problem, Solver, StepSolver, WholeSolver
from .book import Book
from .memory import difference, free_to_write

__all__ = ["drive", "solve"]


def solve(solver: Solver, problem: Problem, z: Tensor, control: Control) -> Outcome:
    """Solve ``z = f(z)`` from the (B, D) matrix ``z`` with any solver."""
    if z.shape[0] == 0 or z.shape[1] == 0:
        empty = torch.zeros(z.shape[0], device=z.device)
        return Outcome(z, empty.long(), empty.long(), empty)
    if isinstance(solver, WholeSolver):
        return solver.solve(problem, z, control)
    assert isinstance(solver, StepSolver)
    return drive(solver, problem, z, control)


def drive(solver: StepSolver, problem: Problem, z: Tensor, control: Control) -> Outcome:
    """Iterate a step solver until every row converged, failed or ran out of evaluations.

    A finished row's value is kept at once. Its place in the batch is given up when enough places
    are free; until then the row is still evaluated, and what becomes of it there is ignored.
    """
    book = Book(z, control)
    state = solver.init(z)
    spare: Tensor | None = None
    for k in range(1, control.max_iter + 1):
        fz = problem.evaluate(z)
        r = difference(fz, z, spare)
        if spare is None and not solver.keeps_residual and free_to_write(r):
            spare = r
        leaving = book.look(k, z, fz, r, problem)
        if leaving is not None:
            book.finish(leaving, k, z, fz)
            if book.unfinished == 0:
                break
        if k == control.max_iter:
            book.exhaust(fz)
            break
        z, state = solver.step(problem, z, fz, r, state)
        may_leave = leaving is not None and problem.can_leave and not control.coupled
        if may_leave and book.unfinished < problem.leave_share * problem.size:
            keep = book.compact()
            z, state = z.index_select(0, keep), _take(state, keep)
            problem.keep(keep)
            spare = None
    return book.outcome()


def _take(state: Any, rows: Tensor) -> Any:
    return rebuild(state, lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf)
