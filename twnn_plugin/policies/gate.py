"""The policy that leaves the choice to each span's gate."""

from __future__ import annotations

from torch import Tensor

from ..gates import FollowsGate
from .base import PolicyView, SpanPolicy

__all__ = ["GatePolicy"]


class GatePolicy(SpanPolicy, FollowsGate):
    """Iterates where the span's own gate is open."""

    def forward(self, view: PolicyView) -> Tensor:
        return view.open
