"""The policy that tosses a coin: the control every learned policy must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Policy, PolicyView

__all__ = ["RandomPolicy"]


class RandomPolicy(Policy):
    """Iterates each sample with probability ``p``, drawn from torch's global generator.

    Args:
        p: probability in [0, 1].
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p <= 1:
            raise OptionError(f"Option p of policy 'random' must be in [0, 1]; got {p!r}.")
        self.p = p

    def forward(self, view: PolicyView) -> Tensor:
        return torch.rand(view.open.shape, device=view.open.device) < self.p
