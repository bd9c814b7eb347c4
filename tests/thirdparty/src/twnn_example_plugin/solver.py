"""Irons & Tuck's vector form of Aitken's relaxation."""

from dataclasses import dataclass

import torch

from twnn_plugin.solvers import StepSolver


@dataclass(frozen=True)
class Aitken(StepSolver):
    """Aitken's relaxation: the step length follows from the last two residuals.

    Args:
        first: step length of the first step.
        largest: bound on the absolute step length.
    """

    first: float = 1.0
    largest: float = 10.0

    def init(self, z):
        return torch.full_like(z[:, :1], self.first), torch.full_like(z, float("nan"))

    def step(self, problem, z, fz, r, state):
        length, last = state
        change = r - last
        square = (change * change).sum(1, keepdim=True)
        updated = -length * (last * change).sum(1, keepdim=True) / square
        usable = torch.isfinite(updated) & (square > 0)
        length = torch.where(usable, updated, length).clamp(-self.largest, self.largest)
        return z + length * r, (length, r)
