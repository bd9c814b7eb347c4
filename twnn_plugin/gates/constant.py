"""Gates that do not learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Gate, GateOutput

__all__ = ["AlwaysGate", "NeverGate"]


class AlwaysGate(Gate):
    """Always fully open: every sample is iterated."""

    def __init__(self, channels: int | None = None):
        super().__init__()

    def forward(self, features: Tensor) -> GateOutput:
        one = features.new_ones(features.shape[0], dtype=torch.float32)
        return GateOutput(one, one, one > 0)


class NeverGate(Gate):
    """Always closed: the plain network, whatever the policy says."""

    def __init__(self, channels: int | None = None):
        super().__init__()

    def forward(self, features: Tensor) -> GateOutput:
        zero = features.new_zeros(features.shape[0], dtype=torch.float32)
        return GateOutput(zero, zero, zero > 0)

    def glance(self, features: Tensor) -> Callable[[], Tensor] | None:
        rows, device = features.shape[0], features.device
        return lambda: torch.zeros(rows, dtype=torch.float32, device=device)
