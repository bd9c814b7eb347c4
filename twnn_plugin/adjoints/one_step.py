"""The one-step (Jacobian-free) gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..solvers import Outcome
from ..types import AdjointReport
from .approximate import told
from .base import Adjoint
from .equation import Call
from .graft import graft, refuse

__all__ = ["OneStep"]


@dataclass(frozen=True)
class OneStep(Adjoint):
    """One-step gradient (JFB): differentiates one application of ``f`` at the solution.

    An approximation: the first term of the Neumann series of the implicit gradient (Fung et al. 2022;
    Geng et al. 2021). Its error grows with the contraction rate of ``f``; its cost is one
    vector-Jacobian product.
    """

    exact: ClassVar[bool] = False

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        with torch.no_grad():
            outcome = call.solve()

        def pull(tape, g, rows):  # type: ignore[no-untyped-def]
            reports.append(told("one_step", outcome, rows, 1))
            return g

        return graft(call, outcome, pull, refuse("one_step"))
