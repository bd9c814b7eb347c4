"""Anderson acceleration by orthogonalised differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Problem, StepSolver

__all__ = ["Anderson"]

_RESTART = 1e2  # growth of ||r|| over its best that discards a row's history
_DEPENDENT = 1e-6  # a difference that lies in the span of the others to this share is dropped


class _History(NamedTuple):
    step: int
    fz: Tensor | None  # (b, D) the last f(z)
    r: Tensor | None  # (b, D) the last residual
    best: Tensor | None  # (b,) the smallest ||r|| so far
    q: tuple[Tensor, ...]  # (b, D) each: orthonormal residual differences
    p: tuple[Tensor, ...]  # (b, D) each: the differences of f that go with them


@dataclass(frozen=True)
class Anderson(StepSolver):
    """Anderson acceleration (type II), orthogonalised, with every row on its own.

    Minimises ``||r||`` over the span of the newest ``memory`` differences (Anderson 1965; Walker &
    Ni 2011). The differences are kept orthonormal by modified Gram-Schmidt, so that no system is
    solved, nothing is regularised by an absolute number, and any scale of ``z`` works. Dropping
    the oldest of an orthonormal set leaves valid secant pairs.

    Args:
        memory: differences kept, >= 1.
        damping: in (0, 1], the share of the residual that is added.
        start: plain steps before the first accelerated one, >= 0; easy rows are done by then.
    """

    memory: int = 5
    damping: float = 1.0
    start: int = 3

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise OptionError(f"Option memory of solver 'anderson' must be at least 1; got {self.memory!r}.")
        if not 0 < self.damping <= 1:
            raise OptionError(f"Option damping of solver 'anderson' must be in (0, 1]; got {self.damping!r}.")
        if self.start < 0:
            raise OptionError(f"Option start of solver 'anderson' must be at least 0; got {self.start!r}.")

    def init(self, z: Tensor) -> _History:
        return _History(0, None, None, None, (), ())

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _History
    ) -> tuple[Tensor, _History]:
        plain = fz if self.damping == 1 else z + self.damping * r
        if state.step < self.start:
            newest = state.step + 1 == self.start  # the first difference needs only the last pair
            return plain, state._replace(
                step=state.step + 1, fz=fz if newest else None, r=r if newest else None
            )
        norm = torch.linalg.vector_norm(r, dim=1)
        if state.r is None or state.fz is None:  # start=0: nothing to take a difference with yet
            return plain, state._replace(step=state.step + 1, fz=fz, r=r, best=norm)
        best = norm if state.best is None else torch.minimum(norm, state.best)
        q, p = self._extend(state, fz, r, norm <= _RESTART * best)
        z_next = plain
        for q_j, p_j in zip(q, p, strict=True):
            gamma = torch.linalg.vecdot(q_j, r)[:, None]
            # p holds differences of f; with damping the step along q shortens the residual's share.
            direction = p_j if self.damping == 1 else p_j - (1 - self.damping) * q_j
            z_next = torch.addcmul(z_next, direction, gamma, value=-1)
        return z_next, _History(state.step + 1, fz, r, best, q, p)

    def _extend(
        self, state: _History, fz: Tensor, r: Tensor, sound: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The history with the newest difference in it; rows that are not ``sound`` lose theirs."""
        assert state.r is not None and state.fz is not None
        q_old, p_old = (
            state.q[-(self.memory - 1) or len(state.q) :],
            state.p[-(self.memory - 1) or len(state.p) :],
        )
        dr, df = r - state.r, fz - state.fz
        length = torch.linalg.vector_norm(dr, dim=1)
        for q_j, p_j in zip(q_old, p_old, strict=True):
            h = torch.linalg.vecdot(q_j, dr)[:, None]
            dr = torch.addcmul(dr, q_j, h, value=-1)
            df = torch.addcmul(df, p_j, h, value=-1)
        rest = torch.linalg.vector_norm(dr, dim=1)
        usable = (rest > _DEPENDENT * length) & sound
        # The inner where keeps 1/0 out of the derivative when the solve is unrolled.
        inverse = (usable / torch.where(usable, rest, 1.0))[:, None]
        q, p = (*q_old, dr * inverse), (*p_old, df * inverse)
        if not bool(sound.all()):
            keep = sound[:, None]
            q = tuple(torch.where(keep, q_j, 0.0) for q_j in q)
            p = tuple(torch.where(keep, p_j, 0.0) for p_j in p)
        return q, p
