"""Counting what a solve does to its map: rows evaluated, and rows of vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counts", "counted"]


@dataclass
class Counts:
    """Work done, in calls and in rows."""

    calls: int = 0
    rows: int = 0
    products: int = 0
    product_rows: int = 0


class _Watch(torch.autograd.Function):
    """Identity whose backward counts one vector-Jacobian product with respect to the state."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, counts: Counts) -> Tensor:
        ctx.counts = counts
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.counts.products += 1
        ctx.counts.product_rows += grads[0].shape[0]
        return grads[0], None


def counted(f: Callable[..., Any], counts: Counts) -> Callable[..., Any]:
    """``f`` with its work written down; the state is a tensor or a tuple of them, batch first.

    A product is counted where the gradient with respect to the state is computed, so a product that
    nobody uses is counted, too: it costs time all the same.
    """

    def watched(z: Any, *context: Tensor) -> Any:
        first = z if isinstance(z, Tensor) else z[0]
        counts.calls += 1
        counts.rows += first.shape[0]
        if isinstance(z, Tensor):
            return f(_Watch.apply(z, counts) if z.requires_grad else z, *context)
        if first.requires_grad:
            z = (_Watch.apply(first, counts), *z[1:])
        return f(z, *context)

    return watched
