"""Irons & Tuck's vector form of Aitken's relaxation."""

import math
from dataclasses import dataclass

import torch

from twnn_plugin import OptionError
from twnn_plugin.solvers import StepSolver


@dataclass(frozen=True)
class Aitken(StepSolver):
    """Aitken's relaxation: the step length follows from the last two residuals.

    Args:
        first: > 0, step length of the first step.
        largest: > 0, bound on the absolute step length.
    """

    first: float = 1.0
    largest: float = 10.0

    def __post_init__(self):
        for option in ("first", "largest"):
            value = getattr(self, option)
            if not (value > 0 and math.isfinite(value)):
                raise OptionError(f"Option {option} of solver 'aitken' must be positive; got {value!r}.")

    def init(self, z):
        return torch.full_like(z[:, :1], self.first), None

    def step(self, problem, z, fz, r, state):
        length, last = state
        if last is not None:
            change = r - last
            square = (change * change).sum(1, keepdim=True)
            moved = square > 0
            # The inner where keeps 0/0 out of the derivative when the solve is unrolled.
            ratio = (last * change).sum(1, keepdim=True) / torch.where(moved, square, 1.0)
            length = torch.where(moved, -length * ratio, length).clamp(-self.largest, self.largest)
        return z + length * r, (length, r)
