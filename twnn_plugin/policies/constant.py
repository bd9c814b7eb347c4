"""Policies that treat all samples alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gates import FollowsGate
from .base import Policy, PolicyView
from .selection import Selection, SelectionView

__all__ = ["AlwaysPolicy", "NeverPolicy"]


class AlwaysPolicy(Policy):
    """Iterates every sample, whatever the gate says; among layers, all of them in one sweep."""

    def forward(self, view: PolicyView) -> Tensor:
        return torch.ones_like(view.open)

    def select(self, view: SelectionView) -> Selection:
        return Selection(torch.full_like(view.counts, view.step == 0, dtype=torch.bool))


class NeverPolicy(Policy, FollowsGate):
    """Iterates no sample: the plain network."""

    def forward(self, view: PolicyView) -> Tensor:
        return torch.zeros_like(view.open)

    def select(self, view: SelectionView) -> Selection:
        return Selection(torch.zeros_like(view.counts, dtype=torch.bool))
