"""The loop of every step solver: tests, budget, rows that leave, statuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import OptionError
from . import hosting
from .base import Control, Outcome, Problem, Solver, StepSolver, WholeSolver, check_place
from .book import Book
from .book_rows import BookRows, fits
from .graphs import Graphs
from .joint import Joint
from .masked import drive_masked
from .memory import free_to_write

__all__ = ["drive", "drive_rows", "solve"]


_CHECK_EVERY = 5  # on an accelerator: a host synchronisation costs a few launches of small kernels


def solve(solver: Solver, problem: Problem, z: Tensor, control: Control) -> Outcome:
    """Solve ``z = f(z)`` from the (B, D) matrix ``z`` with any solver.

    Raises:
        OptionError: ``cuda_graphs`` is asked for off CUDA, where gradients are recorded or with a solver
            that runs its own loop; or ``stop="abs"`` with a ``tol`` too small for the dtype of ``z``.
        MapError: ``f`` returns a state on another device.
    """
    if control.cuda_graphs:
        _check_graphs(solver, z)
    if control.stop == "abs" and control.scale is None:
        _check_measurable(control, z.dtype)
    if z.shape[0] == 0 or z.shape[1] == 0:
        empty = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
        return Outcome(z, empty.long(), empty.long(), empty)
    if control.parts and isinstance(solver, StepSolver) and not control.coupled:
        solver = solver.in_parts(control.parts)
    host = hosting.current()
    if host is not None:
        return host.solve(solver, problem, z, control, _solve)
    return _solve(solver, problem, z, control)


def _solve(solver: Solver, problem: Problem, z: Tensor, control: Control) -> Outcome:
    if isinstance(solver, WholeSolver):
        return solver.solve(problem, z, control)
    assert isinstance(solver, StepSolver)
    if control.coupled:
        solver = Joint(solver)
    every = control.check_every or (1 if z.device.type == "cpu" or control.callback else _CHECK_EVERY)
    if control.cuda_graphs:
        with torch.cuda.device(z.device):
            return drive_masked(solver, problem, z, control, every, Graphs())
    if every > 1:
        return drive_masked(solver, problem, z, control, every)
    return drive(solver, problem, z, control)


def _check_graphs(solver: Solver, z: Tensor) -> None:
    if z.device.type != "cuda":
        raise OptionError(f"cuda_graphs needs a state on a CUDA device; got one on {z.device}.")
    if not isinstance(solver, StepSolver):
        raise OptionError(
            f"cuda_graphs needs a solver whose loop the driver owns; {type(solver).__name__} runs its own. "
            "Use 'picard', 'anderson' or 'broyden', or leave cuda_graphs out."
        )
    if torch.is_grad_enabled():
        raise OptionError(
            "cuda_graphs replays evaluations that autograd does not see: use an adjoint that solves without "
            "recording, such as 'implicit', or torch.no_grad()."
        )


def _check_measurable(control: Control, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    # A norm is the root of a sum of squares, which are zero below; the largest entry is what it is.
    least = tiny if control.norm == "max" else tiny**0.5
    if 0 < control.tol < least:
        raise OptionError(
            f"With stop='abs' and norm={control.norm!r} changes below {least:.1e} cannot be measured in "
            f"{dtype}, so that a row would count as converged wherever it is; got tol={control.tol!r}. Raise "
            "tol, scale the state up, or use stop='rel'."
        )


def drive(solver: StepSolver, problem: Problem, z: Tensor, control: Control) -> Outcome:
    """Iterate a step solver until every row converged, failed or ran out of evaluations.

    A finished row's value is kept at once. Its place in the batch is given up when enough places
    are free; until then the row is still evaluated, and what becomes of it there is ignored.
    """
    book: Book | BookRows
    if fits(z, control):
        book, solver = BookRows(z, control), solver.compiled()
    else:
        book = Book(z, control)
    state = solver.init(z)
    spare: Tensor | None = None
    fz = problem.evaluate(z)
    check_place(fz, z)
    for k in range(1, control.max_iter + 1):
        r, left = book.settle(k, z, fz, spare, problem)
        if left and book.unfinished == 0:
            break
        if spare is None and not solver.keeps_residual and free_to_write(r):
            spare = r
        if k == control.max_iter:
            book.exhaust(fz)
            break
        following, state = solver.step(problem, z, fz, r, state)
        if book.alive is not None and control.coupled:
            # The others hear it: what they settle to must belong to the value that is handed out.
            assert isinstance(book, Book)  # that of compiled rows has none that are coupled
            following = torch.where(book.alive[:, None], following, book.held(z))
        elif book.alive is not None and torch.is_grad_enabled():
            # What becomes of a finished row is ignored, but if it overflows, 0 * inf makes the gradient of
            # every weight NaN: it stands still.
            following = torch.where(book.alive[:, None], following, z.detach())
        z = following
        may_leave = left and problem.can_leave and not control.coupled
        if may_leave and book.unfinished < problem.leave_share * problem.size:
            keep = book.compact()
            z, state = z.index_select(0, keep), solver.keep(state, keep)
            problem.keep(keep)
            spare = None
        fz = problem.evaluate(z)
    return book.outcome()


def drive_rows(
    make: Callable[[Control], StepSolver], problem: Problem, z: Tensor, control: Control
) -> Outcome:
    """Drive a step solver that weighs rows: each by itself, or as one where they are coupled.

    Args:
        make: the step solver for a control; for coupled rows that of the joint row.
        problem: the equation.
        z: (B, D) starting states.
        control: when a row is finished.
    """
    if not control.coupled:
        solver = make(control)
        if control.parts and control.stop == "rel" and control.scale is None:
            solver = solver.in_parts(control.parts)  # an absolute tolerance has a unit already
        return drive(solver, problem, z, control)
    return drive(Joint(make(replace(control, scale=None, parts=()))), problem, z, control)
