"""Vectors that a method keeps, in one tensor: a product with all of them is one operation.

On small states an operation costs more than its arithmetic, on large ones a pass over memory does. The
products of m vectors with one are 2m operations and 3m passes when they are made one by one, and here one
operation and m + 1 passes; it pays from some four vectors on.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_combined", "combined", "dots", "joined"]


def dots(stack: Tensor, x: Tensor) -> Tensor:
    """(b, 1, m) inner products of the vectors in ``stack``, (b, m, D), with ``x``, (b, 1, D), row by row."""
    if _rounded(x):
        return (stack * x).sum(dim=2)[:, None]
    return torch.bmm(x, stack.mT)


def combined(stack: Tensor, factors: Tensor) -> Tensor:
    """(b, 1, D) the combination of the vectors in ``stack``, (b, m, D), by ``factors``, (b, 1, m)."""
    if _rounded(stack):
        return (stack * factors.mT).sum(dim=1, keepdim=True)
    return torch.bmm(factors, stack)


def add_combined(x: Tensor, stack: Tensor, factors: Tensor) -> Tensor:
    """``x``, (b, 1, D), plus :func:`combined`, in one operation."""
    if _rounded(x):
        return x + combined(stack, factors)
    return torch.baddbmm(x, factors, stack)


def joined(stack: Tensor, x: Tensor) -> Tensor:
    """The vectors of a stack, (b, m, D), and one more, (b, 1, D)."""
    return torch.cat((stack, x), dim=1)


def _rounded(x: Tensor) -> bool:
    """Whether matrix products of this dtype are rounded more coarsely than sums: then they are no use here.

    Autocast makes them in half precision; users may have chosen TF32 or bfloat16 for those in float32.
    """
    if torch.is_autocast_enabled(x.device.type):
        return True
    if x.dtype != torch.float32:
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for one backend: torch then has no one answer
        return True
