"""The series while it is fast, minimal residuals for the rows that are not done soon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .base import check_count
from .gcr import GCR, Directions
from .loop import ROUNDING, Krylov, Progress

__all__ = ["Auto"]

_SOON = 3.0  # products: rows that the series finishes within so many stay with it


class _State(NamedTuple):
    gcr: Directions
    bound: Tensor  # (b,) norm at which a row is done
    fast: Tensor  # (b,) bool: accelerated, no longer the plain series


@dataclass(frozen=True)
class Auto(Krylov):
    """The Neumann series while it is fast or nearly done, GCR for all other rows.

    Each row decides for itself, product by product, by the rate at which its own residual falls; the product
    by which it decides is the first of GCR, so that nothing is lost. GCR never needs more products than the
    series; the series needs no inner products and keeps nothing, and as long as all rows stay with it
    nothing else is computed. A row that diverges under the series goes over at its first growth.

    Args:
        memory: directions kept by GCR, >= 1.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        check_count("auto", "memory", self.memory)

    def start(self, r: Tensor, bound: Tensor, eps: float) -> _State:
        return _State(self._gcr.start(r, bound, eps), bound, torch.zeros_like(bound, dtype=torch.bool))

    @property
    def _gcr(self) -> GCR:
        return GCR(self.memory)

    def query(self, state: _State) -> Tensor:
        return state.gcr.query

    def correction(self, state: _State) -> Tensor:
        return state.gcr.d

    def update(
        self, state: _State, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[_State, Progress]:
        old = state.gcr
        before, after = old.size, torch.linalg.vector_norm(product, dim=1)
        # Products that the series still needs: log(after / bound) / log(before / after).
        soon = (after < before) & (after / state.bound <= (before / after) ** _SOON) | (after == 0)
        fast = state.fast | (~soon if active is None else ~soon & active)
        own = torch.finfo(query.dtype).eps * torch.linalg.vector_norm(old.d, dim=1)
        drift = old.drift + ROUNDING * old.eps * before + own
        series = old._replace(r=product, d=old.d + query, query=product, size=after, span=after, drift=drift)
        if not bool(fast.any()):
            return _State(series, state.bound, fast), Progress(after, drift, fast)
        mine = fast if active is None else fast & active
        gcr, progress = self._gcr.update(old, query, product, mine)
        column = fast[:, None]
        gcr = gcr._replace(
            r=torch.where(column, gcr.r, series.r),
            d=torch.where(column, gcr.d, series.d),
            query=torch.where(column, gcr.query, series.query),
            size=torch.where(fast, gcr.size, after),
            span=torch.where(fast, gcr.span, after),
            drift=torch.where(fast, gcr.drift, drift),
        )
        return _State(gcr, state.bound, fast), Progress(gcr.size, gcr.drift, progress.stuck & fast)

    def restart(self, state: _State, r: Tensor, rows: Tensor) -> _State:
        return state._replace(gcr=self._gcr.restart(state.gcr, r, rows))
