"""Broyden's method with a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Problem, StepSolver, check_whole

__all__ = ["Broyden"]

_RESTART = 1e2  # growth of ||r|| over its best that discards a row's history
_DEGENERATE = 1e-7  # an update whose denominator is this small against its factors is left out


class _Pair(NamedTuple):
    """One update: the inverse Jacobian is minus the identity plus the sum of ``weight * u v^T``."""

    u: Tensor  # (b, D)
    v: Tensor  # (b, D)
    weight: Tensor  # (b, 1) 1, or 0 in rows that started anew since


class _Pairs(NamedTuple):
    z: Tensor | None  # (b, D) the last iterate
    r: Tensor | None  # (b, D) its residual
    best: Tensor | None  # (b,) the smallest ||r|| so far
    pairs: tuple[_Pair, ...]


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
        check_whole("broyden", "memory", self.memory)

    def init(self, z: Tensor) -> _Pairs:
        return _Pairs(None, None, None, ())

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Pairs
    ) -> tuple[Tensor, _Pairs]:
        norm = torch.linalg.vector_norm(r, dim=1)
        if state.z is None or state.r is None or state.best is None:
            return fz, _Pairs(z, r, norm, ())
        pairs = () if len(state.pairs) == self.memory else state.pairs
        # Weights, since the host need not know whether any row starts anew.
        sound = (norm <= _RESTART * state.best).to(r.dtype)[:, None]
        newest = _update(pairs, z - state.z, r - state.r)
        pairs = tuple(p._replace(weight=p.weight * sound) for p in (*pairs, newest))
        return z - _inverse(pairs, r), _Pairs(z, r, torch.minimum(norm, state.best), pairs)


def _inverse(pairs: tuple[_Pair, ...], x: Tensor, transposed: bool = False) -> Tensor:
    """``(-I + sum u v^T) x``, or its transpose's product, row by row."""
    product = -x
    for u, v, weight in pairs:
        u, v = (v, u) if transposed else (u, v)
        product = torch.addcmul(product, u, torch.linalg.vecdot(v, x)[:, None] * weight)
    return product


def _update(pairs: tuple[_Pair, ...], dz: Tensor, dr: Tensor) -> _Pair:
    """The newest secant as an update of the inverse (Sherman & Morrison)."""
    moved = _inverse(pairs, dr)
    left = _inverse(pairs, dz, transposed=True)
    denominator = torch.linalg.vecdot(left, dr)
    scale = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(dr, dim=1)
    usable = denominator.abs() > _DEGENERATE * scale
    # The inner where keeps 1/0 out of the derivative when the solve is unrolled.
    factor = (usable / torch.where(usable, denominator, 1.0))[:, None]
    return _Pair((dz - moved) * factor, left, torch.ones_like(factor))
