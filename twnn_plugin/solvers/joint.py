"""Coupled rows as one system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .base import Control, Outcome, Problem, StepSolver
from .driver import drive

__all__ = ["Joint", "drive_rows"]


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
        whole = (1, -1)
        z_next, state = self.method.step(
            problem, z.reshape(whole), fz.reshape(whole), r.reshape(whole), state
        )
        return z_next.view_as(z), state


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
        return drive(make(control), problem, z, control)
    return drive(Joint(make(replace(control, scale=None, parts=()))), problem, z, control)
