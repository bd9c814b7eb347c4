"""Broyden's method with a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .base import Problem, StepSolver, check_whole
from .kelley import Steps
from .kelley_rows import BroydenRows
from .memory import free_to_look, free_to_write
from .units import InUnits

__all__ = ["Broyden"]

_RESTART = 1e2  # growth of ||r|| over its best that discards a row's history
_SINGULAR = 0.05  # a step that the newest update lengthens by more than the inverse of this is not made


class _Past(NamedTuple):
    best: Tensor  # (b,) the smallest ||r|| so far
    steps: Steps


@dataclass(frozen=True)
class Broyden(StepSolver):
    """Broyden's first ("good") method on ``f(z) - z = 0``, with every row on its own.

    Rank-one updates of the inverse Jacobian, from minus the identity, so that the first step is a
    plain one (Broyden 1965; Bai et al. 2019 use it for DEQs), in the form that keeps one vector an
    update (Kelley 1995, section 7.3). When ``memory`` steps are full all but the newest are dropped and
    they are collected anew: unlike a count that grows with ``max_iter``, the memory is bounded.
    No line search, so that a step is one evaluation.

    Args:
        memory: steps kept, >= 1, each a (B, D) matrix.
    """

    memory: int = 15

    def __post_init__(self) -> None:
        check_whole("broyden", "memory", self.memory)

    def in_parts(self, parts: tuple[int, ...]) -> StepSolver:
        return InUnits(self, parts)

    def compiled(self) -> StepSolver:
        # A subclass may do something else in a step.
        if type(self) is not Broyden or self.memory > kernels.SLOTS:
            return self
        return BroydenRows(self.memory, _RESTART, _SINGULAR)

    def init(self, z: Tensor) -> None:
        return None

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Past | None
    ) -> tuple[Tensor, _Past]:
        norm = torch.linalg.vector_norm(r, dim=1)
        if state is None:
            return fz, _Past(norm, Steps.first(r))
        best, steps = torch.minimum(norm, state.best), state.steps
        v, rest = steps.next(r)
        sound = (norm <= _RESTART * state.best)[:, None] & (rest.detach().abs() > _SINGULAR)
        if free_to_write(r) and free_to_look(r) and bool(sound.all()):
            step, keep = v / rest, None
        else:  # weights, since the host need not know whether any row starts anew
            # The inner where keeps 1/0 out of the derivative when the solve is unrolled.
            step = torch.where(sound, v / torch.where(sound, rest, 1.0), r)
            keep = sound
        steps = Steps.first(step) if steps.count == self.memory else steps.extended(step, keep)
        return z + step, _Past(best, steps)
