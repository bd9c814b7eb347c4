"""The seed papers' iterate-to-fixed-point operator: its primal part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Problem, StepSolver

__all__ = ["ADFixedPoint"]


@dataclass(frozen=True)
class ADFixedPoint(StepSolver):
    """The iterate-to-fixed-point operator ``fix`` of Habiba & Pearlmutter (2021), equations 3 and 7.

    ``z <- f(z)`` until it settles, nothing else. With ``adjoint="ad_fixed_point"`` its derivatives are the
    operator's forward and reverse transforms (equations 8 and 9), which iterate in the same way.
    """

    keeps_residual: ClassVar[bool] = False

    def renew(self, state: Any, rows: Tensor, z: Tensor) -> Any:
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        return fz, None
