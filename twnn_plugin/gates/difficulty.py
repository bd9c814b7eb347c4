"""Learning which samples are hard from the loss's own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["watch_closed_difficulty", "watch_difficulty"]


class _Difficulty(torch.autograd.Function):
    """Identity on ``out``; its backward teaches ``margin`` which samples are hard."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, margin: Tensor, share: float) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.share = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (margin,) = ctx.saved_tensors
        return grads[0], _lesson(_sizes(grads[0], margin), margin, ctx.share), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])  # what is taught is no derivative of the value


class _ClosedDifficulty(torch.autograd.Function):
    """Identity on ``out`` and ``closed``; its backward teaches ``margin`` which samples are hard."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, closed: Tensor, margin: Tensor, share: float) -> tuple[Tensor, Tensor]:
        return out.view_as(out), closed.view_as(closed)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.share = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (margin,) = ctx.saved_tensors
        opened, closed = (_sizes(grad, margin) for grad in grads)
        # Without a loss of its own (closed_weight=0) the closed network says nothing.
        size = torch.where((closed > 0).any(), closed, opened)
        return grads[0], grads[1], _lesson(size, margin, ctx.share), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        return tangents[0].view_as(tangents[0]), tangents[1].view_as(tangents[1])


def _sizes(grad: Tensor, margin: Tensor) -> Tensor:
    """(B,) norms of the loss's gradients, sample by sample."""
    size = torch.linalg.vector_norm(grad.detach().flatten(1).to(margin.dtype), dim=1)
    return torch.nan_to_num(size, nan=0.0, posinf=0.0)


def _lesson(size: Tensor, margin: Tensor, share: float) -> Tensor:
    """The gradient of the cross-entropy of "among the largest", in units of the loss's own gradient."""
    margin = margin.detach()  # what is taught is no derivative of the loss, and has none itself
    rank = size.argsort(descending=True, stable=True).argsort()
    hard = (rank < max(1, round(share * size.numel()))).to(margin.dtype)
    return size.mean() * (torch.sigmoid(margin) - hard)


def watch_difficulty(out: Tensor, margin: Tensor, share: float) -> Tensor:
    """``out`` unchanged; in the backward pass ``margin`` learns to tell the hard samples.

    How hard a sample is, is read from the loss itself: the norm of its gradient at the span's output.
    It is near zero where the network is right and sure, whatever the task, and needs no labels.
    ``margin`` receives the gradient of a logistic regression on "among the hardest ``share`` of this
    batch".

    Args:
        out: (B, ...) the span's settled output.
        margin: (B,) scores.
        share: in (0, 1).
    """
    return _Difficulty.apply(out, margin, share)  # type: ignore[return-value]


def watch_closed_difficulty(
    out: Tensor, closed: Tensor, margin: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """``out`` and ``closed`` unchanged; :func:`watch_difficulty` by the loss of the closed network.

    The samples that iterating can help are those that the network gets wrong without; what it gets wrong
    with, it may just as well get wrong faster.

    Args:
        out: (B, ...) the span's settled output.
        closed: (B, ...) its open-loop output, on its way to a closed head. Where its gradient is zero
            throughout, that of ``out`` counts.
        margin: (B,) scores.
        share: in (0, 1).
    """
    return _ClosedDifficulty.apply(out, closed, margin, share)  # type: ignore[return-value]
