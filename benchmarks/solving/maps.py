"""The maps ``f(z, *context)`` of the problems, as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MixedConvCell", "MixedVector", "ResidualSpan", "TwoScale", "Vector"]


class Vector(nn.Module):
    """``tanh(z W + x)``; z, x (B, D)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight + x)


class MixedVector(nn.Module):
    """``tanh(rate * (z W) + x)``; z, x (B, D), rate (B, 1): each row contracts at its own rate."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return torch.tanh(rate * (z @ self.weight) + x)


class MixedConvCell(nn.Module):
    """``x + rate * conv2(relu(norm(x + conv1(z))))``; z, x (B, C, H, W), rate (B, 1, 1, 1).

    A pre-normalised residual cell. The injected input keeps the group norm's statistics nearly
    independent of the state, so that a row's contraction rate is proportional to its ``rate``.

    Args:
        channels: C.
        groups: of the norm.
        scale: of the second convolution's weights, set by :meth:`rescale`.
    """

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        return x + rate * self.conv2(torch.relu(self.norm(x + self.conv1(z))))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply the branch, and so the contraction rate of each row, by ``factor``."""
        self.conv2.weight.mul_(factor)


class TwoScale(nn.Module):
    """Two coupled parts, p of size 1 that settles at once and q of size ``scale`` that settles slowly.

    ``p' = tanh(p A + q C / scale + x)`` and ``q' = scale * tanh(q S / scale + p C^T + x)``; p, q, x (B, D).
    """

    def __init__(self, fast: Tensor, slow: Tensor, coupling: Tensor, scale: float = 1e3):
        super().__init__()
        self.fast, self.slow = nn.Parameter(fast), nn.Parameter(slow)
        self.coupling, self.scale = nn.Parameter(coupling), scale

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        p, q = z[0], z[1] / self.scale
        p_next = torch.tanh(p @ self.fast + q @ self.coupling + x)
        q_next = torch.tanh(q @ self.slow + p @ self.coupling.T + x)
        return p_next, self.scale * q_next


class ResidualSpan(nn.Module):
    """``stage(x + gain * z)``: a residual stage of a backbone, its output fed back to its input.

    Args:
        stage: keeps the shape of its input; used in eval mode.
        gain: share of the output that is fed back; sets the contraction rate.
    """

    def __init__(self, stage: nn.Module, gain: float = 1.0):
        super().__init__()
        self.stage, self.gain = stage.eval(), gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.stage(x + self.gain * z)

    def rescale(self, factor: float) -> None:
        """Multiply the feedback by ``factor``."""
        self.gain *= factor
