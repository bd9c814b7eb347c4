"""The operation that solvers do most, without new memory where that is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_scaled_"]


def add_scaled_(y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """``y + factor * x``, row by row, written over ``y`` unless derivatives are recorded.

    On large states fresh memory costs several times the arithmetic.

    Args:
        y: (b, D), which nobody else may hold.
        x: (b, D).
        factor: (b,).
    """
    if torch.is_grad_enabled():
        return torch.addcmul(y, x, factor[:, None])
    return y.addcmul_(x, factor[:, None])
