"""A stochastic gate with an exact zero and an exact one."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import GateOutput
from .learned import LearnedGate, largest

__all__ = ["HardConcreteGate"]

_LOW, _HIGH = -0.1, 1.1
_EDGE = math.log(-_LOW / _HIGH)  # log alpha at which the gate of eval mode begins to open


class HardConcreteGate(LearnedGate):
    """Hard concrete gate: a stretched, clipped sigmoid with noise in training (Louizos et al. 2018).

    Louizos, Welling & Kingma, "Learning sparse neural networks through L0 regularization", equations 10 to
    13: ``s = sigmoid((log u - log(1 - u) + log alpha) / temperature)`` with uniform u in training, without u
    and temperature in eval mode; the strength is ``clip(1.2 s - 0.1, 0, 1)``. So it is exactly zero or one
    with positive probability, and samples learn by the gradient of the strength in between.

    ``log alpha`` is score minus threshold, shifted so that in eval mode the gate is open where the score is
    above the threshold, by degrees that reach one 4.8 above it. The probability is that of opening in
    training, ``sigmoid(log alpha - temperature log(0.1 / 1.1))``. A fresh gate is closed in eval mode and
    opens for some 6 % of the samples in training. ``l0`` weighs the expected number of open gates. Draws from
    torch's global generator.
    """

    usual_temperature: ClassVar[float] = 2 / 3
    by_margin: ClassVar[bool] = True

    def chance(self, margin: Tensor, temperature: float) -> Tensor:
        alpha = margin * temperature + _EDGE  # the margin is over the temperature, this is not
        return torch.sigmoid(alpha - temperature * _EDGE)

    def forward(self, features: Tensor) -> GateOutput:
        margin = self.margin(features)
        alpha = margin * self.temperature + _EDGE
        probability = self.priced(self.chance(margin, self.temperature))
        if self.training:
            u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((torch.logit(u) + alpha) / self.temperature)
        else:
            s = torch.sigmoid(alpha)
        strength = (s * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)
        opened = largest(strength) > 0 if self.training else largest(margin) > 0
        taught = largest(margin) if self.learns_difficulty() else None
        # Where a policy opens a sample against the gate, something of the message must enter.
        least = torch.where(strength.detach() > 0, strength, probability)
        strength = torch.where(opened.view(-1, *[1] * (margin.dim() - 1)), strength, least)
        return GateOutput(probability, strength, opened, taught)
