"""Coupled rows as one system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Problem, StepSolver

__all__ = ["Joint"]


@dataclass(frozen=True)
class Joint(StepSolver):
    """A step solver that sees the whole (b, D) matrix as a single row of b * D.

    Where rows influence each other, a method that weighs every row by itself builds on directions along
    which no row ever moves. Residuals are still measured row by row, by the driver.

    Args:
        method: the step solver.
    """

    method: StepSolver

    def init(self, z: Tensor) -> Any:
        return self.method.init(z.reshape(1, -1))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        # A row that broke takes no part in products over all rows, which it would break, too.
        sound = torch.isfinite(r).all(dim=1, keepdim=True)
        whole_z, whole_fz, whole_r = (torch.where(sound, x, 0.0).reshape(1, -1) for x in (z, fz, r))
        z_next, state = self.method.step(problem, whole_z, whole_fz, whole_r, state)
        return torch.where(sound, z_next.view_as(z), fz), state
