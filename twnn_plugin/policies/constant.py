"""Policies that treat all samples alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Policy, PolicyView

__all__ = ["AlwaysPolicy", "NeverPolicy"]


class AlwaysPolicy(Policy):
    """Iterates every sample, whatever the gate says."""

    def forward(self, view: PolicyView) -> Tensor:
        return torch.ones_like(view.open)


class NeverPolicy(Policy):
    """Iterates no sample: the plain network."""

    def forward(self, view: PolicyView) -> Tensor:
        return torch.zeros_like(view.open)
