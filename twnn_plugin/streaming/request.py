"""A solve that waits for its rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.base import Control, Outcome, StepSolver
from .modes import Modes

__all__ = ["Owner", "Request"]


@dataclass(eq=False)
class Request:
    """A solve that waits for its rows.

    Attributes:
        solver: its method.
        equation: its equation, with the context of all rows.
        z: (B, D) starting states.
        control: its stopping rule.
        modes: of the thread that it comes from.
        number: of the pass that it belongs to.
        entered: rows that have joined the active batch so far.
        missing: rows that are not done.
        outcome: what came of them, once none is missing.
    """

    solver: StepSolver
    equation: Equation
    z: Tensor
    control: Control
    modes: Modes
    number: int
    entered: int = 0
    missing: int = field(init=False)
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.missing = self.z.shape[0]


Owner = tuple[Request, int]
"""Whose a row of the active batch is, and which of its rows."""
