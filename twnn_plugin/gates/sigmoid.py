"""A gate that opens by degrees."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import GateOutput
from .learned import LearnedGate, largest

__all__ = ["SigmoidGate"]


class SigmoidGate(LearnedGate):
    """Soft gate: lets ``sigmoid(score)`` of the message in once the score is above the threshold.

    Exactly closed below it, so that closed samples cost nothing.
    """

    by_margin: ClassVar[bool] = True

    def forward(self, features: Tensor) -> GateOutput:
        margin = self.margin(features)
        probability = self.priced(self.chance(margin, self.temperature))
        taught = largest(margin) if self.learns_difficulty() else None
        return GateOutput(probability, probability, largest(margin) > 0, taught)
