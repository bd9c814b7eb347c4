"""Learning which samples are hard from the loss's own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["watch_difficulty"]


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
        # What is taught is no derivative of the loss, and has none itself.
        (margin,) = (saved.detach() for saved in ctx.saved_tensors)
        given = grads[0].detach()
        size = torch.linalg.vector_norm(given.flatten(1).to(margin.dtype), dim=1)
        size = torch.nan_to_num(size, nan=0.0, posinf=0.0)
        rank = size.argsort(descending=True, stable=True).argsort()
        hard = (rank < max(1, round(ctx.share * size.numel()))).to(margin.dtype)
        # The gradient of the cross-entropy of "hard", in units of the loss's own gradient.
        return grads[0], size.mean() * (torch.sigmoid(margin) - hard), None


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
