"""The policy that leaves the choice to each span's gate."""

from __future__ import annotations

from torch import Tensor

from .base import PolicyView, SpanPolicy

__all__ = ["GatePolicy"]


class GatePolicy(SpanPolicy):
    """Iterates where the span's own gate is open."""

    def forward(self, view: PolicyView) -> Tensor:
        return view.open
