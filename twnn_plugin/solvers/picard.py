"""Plain (Picard, Banach) iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Problem, StepSolver, is_number

__all__ = ["Picard"]


@dataclass(frozen=True)
class Picard(StepSolver):
    """Plain iteration ``z <- z + damping * (f(z) - z)``.

    Equation 3 of Habiba & Pearlmutter (2021). Converges where ``f`` is a contraction; the right
    choice where the state travels (a front) rather than settles at a linear rate.

    Args:
        damping: in (0, 1]; below 1 it settles maps whose Jacobian has eigenvalues near -1.
    """

    damping: float = 1.0

    keeps_residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_number(self.damping) or not 0 < self.damping <= 1:
            raise OptionError(f"Option damping of solver 'picard' must be in (0, 1]; got {self.damping!r}.")

    def renew(self, state: Any, rows: Tensor, z: Tensor) -> Any:
        return state

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        return (fz if self.damping == 1 else torch.add(z, r, alpha=self.damping)), None
