"""The Neumann series, term by term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Control, Outcome
from .base import LinearProblem, check_count
from .loop import ROUNDING, Krylov, Progress

__all__ = ["Neumann"]


class _Series(NamedTuple):
    r: Tensor  # (b, D) the newest term, which is the residual of the sum of those before it
    d: Tensor  # (b, D) their sum, but for g
    total: Tensor  # (b,) the sum of their norms
    drift: Tensor  # (b,)
    eps: float


@dataclass(frozen=True)
class Neumann(Krylov):
    """The Neumann series ``u = sum_k (J^T)^k g``: plain iteration, one product a term.

    Converges where the spectral radius of J is below one, at that rate; no history is kept. Cut short
    by ``terms`` it is an approximation (Geng et al. 2021), and rows that have not met the tolerance by
    then are reported as ``max_iter``.

    Args:
        terms: terms summed at most, >= 1 (the first is g); ``None``: as many as ``max_iter`` allows.
    """

    terms: int | None = None

    def __post_init__(self) -> None:
        if self.terms is not None:
            check_count("neumann", "terms", self.terms)

    def solve(self, problem: LinearProblem, rhs: Tensor, control: Control) -> Outcome:
        # The product that would make the next term measures the sum of those before it.
        most = control.max_iter if self.terms is None else min(self.terms, control.max_iter)
        return super().solve(problem, rhs, replace(control, max_iter=most))

    def start(self, r: Tensor, bound: Tensor, eps: float) -> _Series:
        nothing = torch.zeros_like(bound)
        return _Series(r, torch.zeros_like(r), nothing, nothing, eps)

    def query(self, state: _Series) -> Tensor:
        return state.r

    def correction(self, state: _Series) -> Tensor:
        return state.d

    def update(
        self, state: _Series, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[_Series, Progress]:
        before = torch.linalg.vector_norm(query, dim=1)
        size = torch.linalg.vector_norm(product, dim=1)
        total = state.total + before
        own = torch.finfo(product.dtype).eps
        drift = state.drift + ROUNDING * state.eps * before + own * total
        state = _Series(product, state.d + query, total, drift, state.eps)
        return state, Progress(size, drift, torch.zeros_like(size).bool())

    def restart(self, state: _Series, r: Tensor, rows: Tensor) -> _Series:
        return _Series(
            torch.where(rows[:, None], r, state.r),
            torch.where(rows[:, None], 0.0, state.d),
            torch.where(rows, 0.0, state.total),
            torch.where(rows, 0.0, state.drift),
            state.eps,
        )
