"""Residuals, tolerances and statuses of rows: one definition for every solver."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Status
from .base import Control

__all__ = ["EPS", "Threshold", "classify", "kinds", "measure", "report_residual", "threshold"]

EPS = 1e-9
"""Added to ``||f(z)||`` so that a fixed point at zero can be met (torchdeq's constant)."""

_norm = torch.linalg.vector_norm


def measure(r: Tensor, fz: Tensor, norm: str, parts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Size of the change and of the state, row by row.

    Args:
        r: (b, D) ``f(z) - z``.
        fz: (b, D) ``f(z)``.
        norm: ``"l2"``, or ``"max"``: the largest absolute entry of ``r`` and the rms of ``fz``.
        parts: widths of parts to measure apart; the one that is farthest from rest counts.

    Returns:
        Two (b,) tensors.
    """
    if parts:
        each = zip(r.split(list(parts), dim=1), fz.split(list(parts), dim=1), strict=True)
        change, size = (torch.stack(x) for x in zip(*(measure(a, b, norm) for a, b in each), strict=True))
        # NaN counts as the largest, and so does a part too large for its norm: no change is small beside it.
        apart = torch.where(size < torch.inf, change / (size + EPS), torch.nan)
        worst = apart.argmax(dim=0, keepdim=True)
        return change.gather(0, worst)[0], size.gather(0, worst)[0]
    size = _norm(fz, dim=1)
    if norm == "l2":
        return _norm(r, dim=1), size
    return _norm(r, float("inf"), dim=1), size / fz.shape[1] ** 0.5


def threshold(size: Tensor, control: Control) -> Tensor | float:
    """What the change must not exceed, (b,) or a number."""
    if control.scale is not None:
        return control.tol * control.scale
    return control.tol * (size + EPS) if control.stop == "rel" else control.tol


class Threshold:
    """:func:`threshold` in one operation, for a loop.

    Args:
        control: the stopping rule.
        like: a tensor of the dtype and device that is measured in.
    """

    def __init__(self, control: Control, like: Tensor):
        self.relative = control.scale is None and control.stop == "rel"
        # Tensors of no dimension: operations with Python numbers cost more than the arithmetic.
        self._tol = torch.full((), control.tol, dtype=like.dtype, device=like.device)
        self._base = self._tol * EPS if self.relative else self._tol
        if control.scale is not None:
            self._base = self._tol * control.scale

    def __call__(self, size: Tensor) -> Tensor:
        """(b,), or of no dimension where all rows have the same: the bound for states of this size."""
        return torch.addcmul(self._base, size, self._tol) if self.relative else self._base


def report_residual(change: Tensor, size: Tensor, control: Control) -> Tensor:
    """The residual as users read it: relative or absolute, as ``stop`` says."""
    if control.scale is not None:
        return change / control.scale.clamp_min(torch.finfo(change.dtype).tiny)
    return change / (size + EPS) if control.stop == "rel" else change


def kinds(status: Tensor) -> frozenset[int]:
    """Which statuses there are: one look of the host, however many questions follow."""
    return frozenset(status.tolist())


def classify(change: Tensor, bound: Tensor | float) -> Tensor:
    """Statuses of rows that leave: converged within ``bound``, else diverged or non-finite."""
    # Where a norm overflows, its bound is infinite, too: infinity is no convergence.
    finite = torch.isfinite(change)
    if isinstance(bound, Tensor):
        finite = finite & torch.isfinite(bound)
    failed = torch.where(finite, int(Status.diverged), int(Status.non_finite))
    return torch.where((change <= bound) & finite, int(Status.converged), failed)
