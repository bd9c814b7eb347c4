"""BiCGSTAB: short recurrences, memory that does not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .loop import ROUNDING, Krylov, Progress

__all__ = ["BiCGSTAB"]

_BREAKDOWN = 10.0  # an inner product this many eps of its factors' norms is zero but for rounding
_CHANCES = 3  # starts with another shadow before a row is given up


class _Pair(NamedTuple):
    r: Tensor  # (b, D) the residual, after the first half of an iteration the intermediate one
    d: Tensor  # (b, D) the correction so far
    p: Tensor  # (b, D) the direction
    v: Tensor  # (b, D) A p
    shadow: Tensor  # (b, D) what residuals are made orthogonal to
    rho: Tensor  # (b,) <shadow, r> at the start of the iteration
    alpha: Tensor  # (b,)
    second: Tensor  # (b,) bool: in the second half of an iteration
    drift: Tensor  # (b,)
    chances: Tensor  # (b,) int
    eps: float


@dataclass(frozen=True)
class BiCGSTAB(Krylov):
    """Stabilised bi-conjugate gradients (van der Vorst 1992): eight (B, D) matrices, whatever happens.

    Two products an iteration, of which the first may already finish a row. A row whose inner products
    break down starts anew from its measured residual; if that does not help, with another shadow.
    The residual is not monotone.
    """

    def start(self, r: Tensor, bound: Tensor, eps: float) -> _Pair:
        nothing, zero = torch.zeros_like(bound), torch.zeros_like(r)
        rho = torch.linalg.vecdot(r, r)
        chances = torch.full_like(bound, _CHANCES, dtype=torch.long)
        return _Pair(r, zero, r, zero, r, rho, nothing, nothing.bool(), nothing, chances, eps)

    def query(self, state: _Pair) -> Tensor:
        return torch.where(state.second[:, None], state.r, state.p)

    def correction(self, state: _Pair) -> Tensor:
        return state.d

    def update(
        self, state: _Pair, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[_Pair, Progress]:
        image = query - product
        first = ~state.second if active is None else ~state.second & active
        second = state.second if active is None else state.second & active
        tiny = _BREAKDOWN * torch.finfo(query.dtype).eps
        length = torch.linalg.vector_norm(image, dim=1)
        # The step along the query: alpha in the first half, omega in the second.
        against = torch.where(first[:, None], state.shadow, image)
        top = torch.where(first, state.rho, torch.linalg.vecdot(image, state.r))
        bottom = torch.linalg.vecdot(against, image)
        size_of = torch.linalg.vector_norm
        sound = bottom.abs() > tiny * size_of(against, dim=1) * length
        moving = sound & (first | second)
        step = torch.where(moving, top, 0.0) / torch.where(moving, bottom, 1.0)
        sound = sound & (first | (top.abs() > tiny * length * size_of(state.r, dim=1)))
        r = torch.addcmul(state.r, image, step[:, None], value=-1)
        d = torch.addcmul(state.d, query, step[:, None])
        # The next direction, at the end of the second half.
        rho = torch.linalg.vecdot(state.shadow, r)
        size = size_of(r, dim=1)
        bottom = state.rho * step
        sound = sound & (first | ((bottom != 0) & (rho.abs() > tiny * size_of(state.shadow, dim=1) * size)))
        renew = second & sound
        beta = torch.where(renew, rho * state.alpha, 0.0) / torch.where(renew, bottom, 1.0)
        p = r + beta[:, None] * torch.addcmul(state.p, state.v, step[:, None], value=-1)
        rounding = ROUNDING * state.eps * (size_of(query, dim=1) + length)
        own = torch.finfo(r.dtype).eps * size_of(d, dim=1)
        stuck = ~sound if active is None else ~sound & active
        state = _Pair(
            r,
            d,
            torch.where(renew[:, None], p, state.p),
            torch.where(first[:, None], image, state.v),
            state.shadow,
            torch.where(renew, rho, state.rho),
            torch.where(first, step, state.alpha),
            (first & sound) | (state.second & ~renew),
            state.drift + step.abs() * rounding + own,
            state.chances,
            state.eps,
        )
        return state, Progress(size, state.drift, stuck)

    def restart(self, state: _Pair, r: Tensor, rows: Tensor) -> _Pair:
        return _restarted(state, r, r, rows)

    def rescue(self, state: _Pair, r: Tensor, rows: Tensor) -> tuple[_Pair, Tensor]:
        more = rows & (state.chances > 0)
        # Any vector that is not orthogonal to r serves; one that has something of every direction.
        turn = 1.0 + state.chances[:, None]
        wave = torch.cos(turn * torch.arange(r.shape[1], device=r.device, dtype=r.dtype))
        length = torch.linalg.vector_norm(r, dim=1, keepdim=True)
        shadow = r + length * wave / torch.linalg.vector_norm(wave, dim=1, keepdim=True)
        state = state._replace(chances=state.chances - more.long())
        return _restarted(state, r, shadow, more), more


def _restarted(state: _Pair, r: Tensor, shadow: Tensor, rows: Tensor) -> _Pair:
    column = rows[:, None]
    return _Pair(
        torch.where(column, r, state.r),
        torch.where(column, 0.0, state.d),
        torch.where(column, r, state.p),
        torch.where(column, 0.0, state.v),
        torch.where(column, shadow, state.shadow),
        torch.where(rows, torch.linalg.vecdot(shadow, r), state.rho),
        torch.where(rows, 0.0, state.alpha),
        state.second & ~rows,
        torch.where(rows, 0.0, state.drift),
        state.chances,
        state.eps,
    )
