"""A gate that is either open or closed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import GateOutput
from .learned import LearnedGate, largest

__all__ = ["StraightThroughGate"]


class StraightThroughGate(LearnedGate):
    """Open or closed; learns through its probability (straight-through, Bengio et al. 2013) or difficulty.

    A closed sample contributes exactly nothing to the forward pass, in training too. Where the gate learns
    from its message (no budget, ``learn="benefit"`` or ``control="dual"``), the sample's gate and message
    receive the gradient they would have if they were open by the gate's probability all the same. With a
    budget kept by the threshold the score learns difficulty, and the message from open samples alone.
    """

    by_margin: ClassVar[bool] = True

    def forward(self, features: Tensor) -> GateOutput:
        margin = self.margin(features)
        opened = largest(margin) > 0  # false for NaN: a broken sample is not iterated
        strength = torch.ones_like(margin)
        if margin.dim() > 1:  # of a sample that a policy opens against the gate, all channels are
            strength = torch.where(opened[:, None], (margin > 0).to(margin.dtype), 1.0)
        taught = largest(margin) if self.learns_difficulty() else None
        return GateOutput(self.priced(self.chance(margin, self.temperature)), strength, opened, taught)
