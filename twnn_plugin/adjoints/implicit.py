"""The implicit gradient: a linear solve at the fixed point."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..solvers import Control, Outcome, Solver, StepSolver, registry, solve
from ..types import AdjointReport, Status
from .base import Adjoint
from .equation import Call, Equation
from .graft import Tape, graft

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Implicit gradient: solves ``u = J^T u + g`` for each row, then pulls u back through ``f``.

    Exact up to the tolerance (equation 8 of Habiba & Pearlmutter 2021; equation 5 of Mathur & Plis
    2023; the implicit function theorem). Memory: one evaluation of ``f``. Rows leave the backward
    solve as they leave the forward one. A row whose backward solve fails gets ``u = g``, the
    one-step gradient, and its status says so. Second derivatives raise.

    Args:
        solver: name or instance of the solver of the linear equation; ``None``: ``"anderson"``,
            which is a truncated Krylov method on a linear map.
        tol: tolerance relative to ``||g||``, row by row; ``None``: that of the forward solve.
        max_iter: vector-Jacobian products per row; ``None``: as many as the forward solve had, but
            at least 20.
    """

    solver: str | Solver | None = None
    tol: float | None = None
    max_iter: int | None = None

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tol is not None and not self.tol > 0:
            raise OptionError(f"Option tol of adjoint 'implicit' must be positive; got {self.tol!r}.")
        if self.max_iter is not None and self.max_iter < 1:
            raise OptionError(
                f"Option max_iter of adjoint 'implicit' must be at least 1; got {self.max_iter!r}."
            )
        registry.resolve(self.solver if self.solver is not None else "anderson")

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        with torch.no_grad():
            outcome = call.solve()
        autocast = _autocast_state(call.z0.device.type)

        def pull(tape: Tape, g: Tensor, rows: Tensor | None) -> Tensor:
            with autocast():
                return self._solve(call, outcome.value, tape, g, rows, reports)

        return graft(call, outcome, pull)

    def _solve(
        self, call: Call, z: Tensor, tape: Tape, g: Tensor, rows: Tensor | None, reports: list[AdjointReport]
    ) -> Tensor:
        solver = registry.resolve(self.solver if self.solver is not None else "anderson")
        scale = torch.linalg.vector_norm(g, dim=1)
        control = Control(
            tol=max(self.tol or call.control.tol, 4 * torch.finfo(g.dtype).eps),
            max_iter=self.max_iter or max(call.control.max_iter, 20),
            scale=scale if isinstance(solver, StepSolver) else None,
            coupled=call.control.coupled,
        )
        problem = _Linear(call, z, tape, g, rows)
        live = _live(call, rows)
        if live is None:
            solved = solve(solver, problem, g, control)
            u = _checked(solved, g)
        else:  # rows that do not depend on z have u = g
            solved, u = _nothing_to_solve(g), g
            if live.numel():
                problem.keep(live)
                part = solve(solver, problem, g[live], replace(control, scale=_pick(control.scale, live)))
                u = g.index_copy(0, live, _checked(part, g[live]))
                solved = Outcome(
                    u,
                    solved.status.index_copy(0, live, part.status),
                    solved.steps.index_copy(0, live, part.steps),
                    solved.residual.index_copy(0, live, part.residual),
                )
        reports.append(
            AdjointReport("implicit", True, *_whole(solved, rows, call), evaluations=problem.evaluations)
        )
        return u


def _live(call: Call, rows: Tensor | None) -> Tensor | None:
    """Indices of the rows that depend on z, where leaving the others out pays; None: take all."""
    if call.settled is None or not call.context:
        return None
    settled = call.settled if rows is None else call.settled[rows]
    live = torch.nonzero(~settled).flatten()
    return live if live.numel() < Equation.leave_share * settled.numel() else None


def _checked(solved: Outcome, g: Tensor) -> Tensor:
    """The solution, with the one-step gradient in rows that failed."""
    failed = (solved.status == int(Status.diverged)) | (solved.status == int(Status.non_finite))
    return torch.where(failed[:, None], g, solved.value)


def _nothing_to_solve(g: Tensor) -> Outcome:
    status = torch.full((g.shape[0],), int(Status.converged), device=g.device)
    return Outcome(g, status, torch.zeros_like(status), torch.zeros_like(g[:, 0]))


def _pick(scale: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if scale is None else scale[rows]


def _whole(solved: Outcome, rows: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Status, steps and residual over the whole batch; rows kept out are non-finite."""
    if rows is None:
        return solved.status, solved.steps, solved.residual
    batch = call.z0.shape[0]
    status = solved.status.new_full((batch,), int(Status.non_finite)).index_copy(0, rows, solved.status)
    steps = solved.steps.new_zeros(batch).index_copy(0, rows, solved.steps)
    residual = solved.residual.new_full((batch,), float("nan")).index_copy(0, rows, solved.residual)
    return status, steps, residual


def _autocast_state(device: str) -> Any:
    """The present autocast setting, to be entered again in the backward pass."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype)


class _Linear:
    """``u -> J^T u + g`` at the solution (a ``Problem``).

    The graph of one evaluation serves all products. When most rows are done, ``f`` is evaluated once
    more on the others, so that later products cost what those rows cost.
    """

    leave_share = 0.5  # a new graph costs about one product

    def __init__(self, call: Call, z: Tensor, tape: Tape, g: Tensor, rows: Tensor | None):
        self.call, self.z, self.tape, self.g = call, z, tape, g
        self.rows = torch.arange(z.shape[0], device=z.device) if rows is None else rows
        self.size = g.shape[0]
        self.evaluations = 0
        self.can_leave = bool(call.context)

    def evaluate(self, z: Tensor) -> Tensor:
        self.evaluations += self.size
        return self.tape.pull(z) + self.g

    def keep(self, rows: Tensor) -> None:
        self.rows, self.g, self.size = self.rows[rows], self.g[rows], rows.numel()
        self.tape = Tape(self.call, self.z[self.rows], self.rows, attached=False)
