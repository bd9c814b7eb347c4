"""The phantom gradient: a few damped steps at the solution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..solvers import Outcome
from ..solvers.base import is_number
from ..types import AdjointReport, Status
from .approximate import told
from .base import Adjoint
from .equation import Call
from .graft import attach, check_rows, of_nobody, refuse

__all__ = ["Phantom"]


@dataclass(frozen=True)
class Phantom(Adjoint):
    """Phantom gradient: differentiates a few damped steps from the solution.

    An approximation (Geng et al. 2021, unrolled form): the first terms of a damped Neumann series,
    whose error falls with ``steps`` and grows with the contraction rate of ``f``. It needs no
    converged solve, which makes it robust early in training. Memory grows with ``steps``.

    Args:
        steps: applications of ``f`` that are differentiated, >= 1.
        damping: in (0, 1], the share of each application.
    """

    steps: int = 4
    damping: float = 0.5

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"Option steps of adjoint 'phantom' must be at least 1; got {self.steps!r}.")
        if not is_number(self.damping) or not 0 < self.damping <= 1:
            raise OptionError(f"Option damping of adjoint 'phantom' must be in (0, 1]; got {self.damping!r}.")

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        with torch.no_grad():
            outcome = call.solve()
        if not torch.is_grad_enabled():
            return outcome
        if outcome.value.shape[1] == 0:
            return replace(outcome, value=call.equation().evaluate(outcome.value))
        good = torch.isfinite(outcome.value).all(dim=1) & (outcome.status != int(Status.non_finite))
        if call.control.coupled:  # f is a map of the whole batch: of some rows it is another one
            good = torch.ones_like(good)
        if not bool(good.any()):
            return of_nobody(call, outcome)
        outcome, z, rows = self._steps(call, outcome, good)
        finite = torch.isfinite(z.detach()).all(dim=1)
        # Rows that diverged so far that the steps overflow.
        if not call.control.coupled and not bool(finite.all()):
            good = finite if rows is None else good.index_copy(0, rows, finite)
            if not bool(good.any()):
                return of_nobody(call, outcome)
            outcome, z, rows = self._steps(call, outcome, good)
        start = outcome.value if rows is None else outcome.value[rows]
        begin = call.z0 if call.z0.requires_grad else None
        if not z.requires_grad and begin is None:
            return outcome

        def pull(g: Tensor) -> Tensor:
            reports.append(told("phantom", outcome, rows, self.steps))
            return g

        # The value stays the solution, with and without gradients; the steps give the gradient alone.
        value = attach(z, start, begin, pull, refuse("phantom"))
        if rows is not None:
            value = outcome.value.index_copy(0, rows, value)
        return Outcome(value, outcome.status, outcome.steps, outcome.residual)

    def _steps(self, call: Call, outcome: Outcome, good: Tensor) -> tuple[Outcome, Tensor, Tensor | None]:
        """The outcome looked at anew, the states after the steps, and the rows that took them; None: all."""
        rows = None if bool(good.all()) else torch.nonzero(good).flatten()
        z = outcome.value if rows is None else outcome.value[rows]
        equation = call.equation(rows)
        for step in range(self.steps):
            fz = equation.evaluate(z)
            if step == 0:
                outcome = check_rows(call, outcome, z, fz, rows)
            z = torch.lerp(z, fz, self.damping)
        call.evaluations += equation.evaluations
        return outcome, z, rows
