"""Differentiating through the iterations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..solvers import Outcome
from ..types import AdjointReport
from .base import Adjoint
from .equation import Call

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through every iteration that was made.

    The exact derivative of the computed state (not of the fixed point: for that, the solve must have
    converged tightly). Memory grows with the iterations. Derivatives of any order work, and the
    starting state gets a gradient.
    """

    exact: ClassVar[bool] = False

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        outcome = call.solve()
        if call.settled is None or not bool(call.settled.any()) or not torch.is_grad_enabled():
            return outcome
        # Settled rows were not iterated; one evaluation gives them their share of the gradient.
        rows = torch.nonzero(call.settled).flatten()
        equation = call.equation(rows)
        value = equation.evaluate(call.z0[rows])
        call.evaluations += equation.evaluations
        return replace(outcome, value=outcome.value.index_copy(0, rows, value))
