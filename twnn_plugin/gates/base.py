"""What a gate is: how much of a wormhole's message enters, sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Gate", "GateOutput", "LearnedGate"]


class GateOutput(NamedTuple):
    """A gate's opinion on a batch.

    Attributes:
        probability: (B,) in [0, 1], differentiable: what the gate learns through.
        strength: (B,) in [0, 1], differentiable or constant: the factor on the message where the
            wormhole is open.
        open: (B,) bool: whether the gate itself would open.
    """

    probability: Tensor
    strength: Tensor
    open: Tensor


class Gate(nn.Module, ABC):
    """Decides from pooled activations; one instance a wormhole.

    Factories registered as gates take ``channels`` (features per sample) and their own options.
    """

    @abstractmethod
    def forward(self, features: Tensor) -> GateOutput:
        """Look at pooled activations of the span's open-loop output, (B, C)."""


class LearnedGate(Gate):
    """A small perceptron on layer-normalised features, with a threshold that can track a budget.

    With ``budget`` set, the threshold follows the (1 - budget) quantile of the scores seen in
    training, so that this share of samples opens: the user states the cost and gets it, and the
    gate can collapse neither to never nor to always. The threshold starts at zero, above the scores
    of a fresh gate, and comes down over some ``1 / momentum`` steps, which opens it gradually.

    Args:
        channels: features per sample.
        hidden: width of the hidden layer.
        bias: initial score; negative is closed.
        temperature: scores are divided by it.
        budget: wanted share of open samples in (0, 1), or None for a fixed threshold.
        momentum: of the running quantile, per training step.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        bias: float = -2.0,
        temperature: float = 1.0,
        budget: float | None = None,
        momentum: float = 0.1,
    ):
        super().__init__()
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"A gate's budget is a share of samples in (0, 1), or None; got {budget!r}.")
        if not temperature > 0:
            raise ValueError(f"A gate's temperature must be positive; got {temperature!r}.")
        self.temperature, self.budget, self.momentum = temperature, budget, momentum
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.hidden = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.constant_(self.score.bias, bias)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def margin(self, features: Tensor) -> Tensor:
        """(B,) score minus threshold, over the temperature; updates the threshold in training."""
        score = self.score(torch.relu(self.hidden(self.norm(features)))).squeeze(-1)
        margin = (score - self.threshold) / self.temperature
        if self.training and self.budget is not None and score.numel():
            with torch.no_grad():
                wanted = torch.quantile(score.detach().float(), 1 - self.budget)
                # A NaN sample must not reach the threshold, which all samples share.
                step = torch.nan_to_num(wanted - self.threshold, nan=0.0, posinf=0.0, neginf=0.0)
                # Out of place: the graph of this step still needs the old value.
                self.threshold = self.threshold + self.momentum * step.to(self.threshold.dtype)
        return margin
