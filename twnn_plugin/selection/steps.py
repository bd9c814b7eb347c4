"""For sequences: a normalisation that keeps time steps apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StepNorm"]


class StepNorm(nn.Module):
    """Root-mean-square normalisation of each position by itself, over its channels (Zhang & Sennrich 2019).

    In place of a message's group normalisation, which averages over positions and so carries the future into
    the past. A position of zeros stays one: padding sends nothing.

    Args:
        channels: C.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, state: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        wide = state.to(torch.promote_types(state.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
        weight = self.weight.view(-1, *[1] * (state.dim() - 2))
        return ((wide * scale).to(state.dtype)) * weight
