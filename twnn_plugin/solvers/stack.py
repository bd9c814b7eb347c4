"""Vectors that a method keeps, in one tensor: a product with all of them is one operation.

On small states an operation costs more than its arithmetic, on large ones a pass over memory does. The
products of m vectors with one are 2m operations and 3m passes when they are made one by one, and here one
operation and m + 1 passes; it pays from some four vectors on.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_combined", "dots", "joined"]


def dots(stack: Tensor, x: Tensor) -> Tensor:
    """(b, m) inner products of the vectors in ``stack``, (b, m, D), with ``x``, (b, D), row by row."""
    if _rounded(x):
        return (stack * x[:, None]).sum(dim=2)
    return torch.bmm(x[:, None], stack.transpose(1, 2))[:, 0]


def add_combined(x: Tensor, stack: Tensor, factors: Tensor) -> Tensor:
    """``x``, (b, D), plus the combination of the vectors in ``stack``, (b, m, D), by ``factors``, (b, m)."""
    if _rounded(x):
        return x + (stack * factors[:, :, None]).sum(dim=1)
    return torch.baddbmm(x[:, None], factors[:, None], stack)[:, 0]


def joined(stack: Tensor, x: Tensor) -> Tensor:
    """The vectors of a stack, (b, m, D), and one more, (b, D)."""
    return torch.cat((stack, x[:, None]), dim=1)


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
