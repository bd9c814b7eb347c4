"""Broyden's method with a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Problem, StepSolver

__all__ = ["Broyden"]

_RESTART = 1e2  # growth of ||r|| over its best that discards a row's history
_DEGENERATE = 1e-7  # an update whose denominator is this small against its factors is left out


class _Pairs(NamedTuple):
    z: Tensor | None  # (b, D) the last iterate
    r: Tensor | None  # (b, D) its residual
    best: Tensor | None  # (b,) the smallest ||r|| so far
    u: tuple[Tensor, ...]  # (b, D) each: the inverse Jacobian is -I + sum of u v^T
    v: tuple[Tensor, ...]


@dataclass(frozen=True)
class Broyden(StepSolver):
    """Broyden's first ("good") method on ``f(z) - z = 0``, with every row on its own.

    Rank-one updates of the inverse Jacobian, from minus the identity, so that the first step is a
    plain one (Broyden 1965; Bai et al. 2019 use it for DEQs). When ``memory`` pairs are full they are
    dropped and collected anew: unlike a count that grows with ``max_iter``, the memory is bounded.
    No line search, so that a step is one evaluation.

    Args:
        memory: pairs of vectors kept, >= 1.
    """

    memory: int = 15

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise OptionError(f"Option memory of solver 'broyden' must be at least 1; got {self.memory!r}.")

    def init(self, z: Tensor) -> _Pairs:
        return _Pairs(None, None, None, (), ())

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Pairs
    ) -> tuple[Tensor, _Pairs]:
        norm = torch.linalg.vector_norm(r, dim=1)
        if state.z is None or state.r is None or state.best is None:
            return fz, _Pairs(z, r, norm, (), ())
        u, v = state.u, state.v
        if len(u) == self.memory:
            u, v = (), ()
        u, v = _update(u, v, z - state.z, r - state.r)
        sound = norm <= _RESTART * state.best
        if not bool(sound.all()):
            u = tuple(torch.where(sound[:, None], u_j, 0.0) for u_j in u)
        return z - _inverse(u, v, r), _Pairs(z, r, torch.minimum(norm, state.best), u, v)


def _inverse(u: tuple[Tensor, ...], v: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """``(-I + sum u v^T) x``, row by row."""
    product = -x
    for u_j, v_j in zip(u, v, strict=True):
        product = torch.addcmul(product, u_j, torch.linalg.vecdot(v_j, x)[:, None])
    return product


def _update(
    u: tuple[Tensor, ...], v: tuple[Tensor, ...], dz: Tensor, dr: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The pairs with the newest secant in them (Sherman & Morrison)."""
    moved = _inverse(u, v, dr)
    left = _inverse(v, u, dz)  # the transposed inverse
    denominator = torch.linalg.vecdot(left, dr)
    scale = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(dr, dim=1)
    usable = denominator.abs() > _DEGENERATE * scale
    # The inner where keeps 1/0 out of the derivative when the solve is unrolled.
    factor = (usable / torch.where(usable, denominator, 1.0))[:, None]
    return (*u, (dz - moved) * factor), (*v, left)
