"""Gradients of zeros for parameters that a pass had no use for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import transforms

__all__ = ["anchored"]


class _Anchor(torch.autograd.Function):
    """The value; in the backward pass zeros for parameters, which may have no part in it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.like]
        return (grads[0], *zeros)


def anchored(value: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``value``, through which each of ``parameters`` that learns gets a gradient, if only of zeros.

    DistributedDataParallel waits for every parameter's gradient in every step, whoever was iterated. The
    transforms of ``torch.func`` give zeros of their own.
    """
    if transforms.active():
        return value
    learning = [p for p in parameters if p.requires_grad]
    return _Anchor.apply(value, *learning) if learning else value  # type: ignore[return-value]
