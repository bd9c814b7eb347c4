"""What a policy is: who is iterated."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..types import PolicyView

__all__ = ["Policy", "PolicyView"]


class Policy(nn.Module, ABC):
    """Picks the samples whose span is iterated. Policies are modules, so that they may learn."""

    @abstractmethod
    def forward(self, view: PolicyView) -> Tensor:
        """(B,) bool: true where the span is to be iterated."""
