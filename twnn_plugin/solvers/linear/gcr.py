"""GCR: minimal residuals, row by row, without a system to solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..axpy import add_scaled_
from .base import check_count
from .loop import ROUNDING, Krylov, Progress

__all__ = ["GCR", "Directions"]

_DEPENDENT = 1e-6  # a direction that lies in the span of the others to this share is of no use
_STALLED = 1e-2  # a step that takes less than this share of the residual out says little about the next


class Directions(NamedTuple):
    """The state of GCR."""

    r: Tensor  # (b, D) the residual
    d: Tensor  # (b, D) the correction so far
    query: Tensor  # (b, D) the next direction
    size: Tensor  # (b,) ||r||
    span: Tensor  # (b,) ||query||
    q: tuple[Tensor, ...]  # (b, D) each: orthonormal A p
    p: tuple[Tensor, ...]  # (b, D) each: the directions that go with them
    live: Tensor  # (b, m) 1 for the pairs made since the row's start, 0 for those before
    error: Tensor  # (b,) bound on the rounding errors of the q, sqrt(sum of ||q - A p||^2)
    drift: Tensor  # (b,) bound on ||r - true residual||
    eps: float


@dataclass(frozen=True)
class GCR(Krylov):
    """Generalised conjugate residuals: each product makes the residual as small as it can be.

    The residuals of GMRES without its Hessenberg matrix (Eisenstat, Elman & Schultz 1983). Products are
    kept orthonormal by modified Gram-Schmidt. A step that hardly shortens the residual, where GCR
    breaks down, is followed by the product of the newest ``A p`` (ORTHODIR, Young & Jea 1980).
    When ``memory`` directions are full the oldest is dropped (ORTHOMIN, Vinsome 1976), which leaves
    the residual monotone.

    Args:
        memory: directions kept, >= 1; each is two (B, D) matrices, made as they are needed. A few do where
            the Jacobian is a contraction, many where its norm is well above one.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        check_count("gcr", "memory", self.memory)

    def start(self, r: Tensor, bound: Tensor, eps: float) -> Directions:
        nothing, size = torch.zeros_like(bound), torch.linalg.vector_norm(r, dim=1)
        return Directions(
            r, torch.zeros_like(r), r, size, size, (), (), r.new_zeros(r.shape[0], 0), nothing, nothing, eps
        )

    def query(self, state: Directions) -> Tensor:
        return state.query

    def correction(self, state: Directions) -> Tensor:
        return state.d

    def update(
        self, state: Directions, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[Directions, Progress]:
        cut = -(self.memory - 1) or len(state.q)
        q_old, p_old, live = state.q[cut:], state.p[cut:], state.live[:, cut:]
        q, p = query - product, query.clone()
        length = torch.linalg.vector_norm(q, dim=1)
        for q_j, p_j, live_j in zip(q_old, p_old, live.unbind(1), strict=True):
            h = -torch.linalg.vecdot(q_j, q) * live_j
            q, p = add_scaled_(q, q_j, h), add_scaled_(p, p_j, h)
        rest = torch.linalg.vector_norm(q, dim=1)
        usable = rest > _DEPENDENT * length
        if active is not None:
            usable = usable & active
        inverse = usable / torch.where(usable, rest, 1.0)
        q, p = q * inverse[:, None], p * inverse[:, None]
        alpha = torch.linalg.vecdot(q, state.r)
        r = torch.addcmul(state.r, q, alpha[:, None], value=-1)
        d = torch.addcmul(state.d, p, alpha[:, None])
        size = torch.linalg.vector_norm(r, dim=1)
        stalled = usable & (alpha.abs() <= _STALLED * state.size)
        # ||q - A p|| of the new pair: its own rounding, and that of the pairs taken out of it.
        rounding = ROUNDING * state.eps * (state.span + length)
        new = inverse * (rounding + length * state.error)
        own = torch.finfo(r.dtype).eps * torch.linalg.vector_norm(d, dim=1)
        useless = ~usable if active is None else ~usable & active
        state = Directions(
            r,
            d,
            torch.where(stalled[:, None], q, r),
            size,
            torch.where(stalled, 1.0, size),
            (*q_old, q),
            (*p_old, p),
            torch.nn.functional.pad(live, (0, 1), value=1.0),
            torch.hypot(state.error, new),
            state.drift + alpha.abs() * new + own,
            state.eps,
        )
        return state, Progress(size, state.drift, useless)

    def restart(self, state: Directions, r: Tensor, rows: Tensor) -> Directions:
        keep, size = ~rows, torch.linalg.vector_norm(r, dim=1)
        column = keep[:, None]
        return Directions(
            torch.where(column, state.r, r),
            torch.where(column, state.d, 0.0),
            torch.where(column, state.query, r),
            torch.where(keep, state.size, size),
            torch.where(keep, state.span, size),
            state.q,
            state.p,
            torch.where(column, state.live, 0.0),
            torch.where(keep, state.error, 0.0),
            torch.where(keep, state.drift, 0.0),
            state.eps,
        )
