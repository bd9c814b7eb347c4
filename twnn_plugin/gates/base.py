"""What a gate is: how much of a wormhole's message enters, sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Gate", "GateOutput", "LearnedGate", "watch_difficulty"]


class GateOutput(NamedTuple):
    """A gate's opinion on a batch.

    Attributes:
        probability: (B,) in [0, 1], differentiable: what the gate learns through.
        strength: (B,) in [0, 1], differentiable or constant: the factor on the message where the
            wormhole is open.
        open: (B,) bool: whether the gate itself would open.
        margin: (B,) score above the threshold, for gates that learn from difficulty; else None: the
            gate learns through its probability.
    """

    probability: Tensor
    strength: Tensor
    open: Tensor
    margin: Tensor | None = None


class Gate(nn.Module, ABC):
    """Decides from pooled activations; one instance a wormhole.

    Factories registered as gates take ``channels`` (features per sample) and their own options.
    """

    @abstractmethod
    def forward(self, features: Tensor) -> GateOutput:
        """Look at pooled activations of the span's open-loop output, (B, C)."""


class _Difficulty(torch.autograd.Function):
    """Identity on ``out``; its backward teaches ``margin`` which samples are hard."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, margin: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(margin)
        ctx.share = share
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (margin,) = ctx.saved_tensors
        size = torch.linalg.vector_norm(grads[0].flatten(1).to(margin.dtype), dim=1)
        size = torch.nan_to_num(size, nan=0.0, posinf=0.0)
        hard = torch.zeros_like(margin)
        hard[size.topk(max(1, round(ctx.share * size.numel()))).indices] = 1
        # The gradient of the cross-entropy of "hard", in units of the loss's own gradient.
        return grads[0], size.mean() * (torch.sigmoid(margin) - hard), None


def watch_difficulty(out: Tensor, margin: Tensor, share: float) -> Tensor:
    """``out`` unchanged; in the backward pass ``margin`` learns to tell the hard samples.

    How hard a sample is, is read from the loss itself: the norm of its gradient at the span's output.
    It is near zero where the network is right and sure, whatever the task, and needs no labels.
    ``margin`` receives the gradient of a logistic regression on "among the hardest ``share`` of this
    batch".

    Args:
        out: (B, ...) the span's settled output.
        margin: (B,) scores.
        share: in (0, 1).
    """
    return _Difficulty.apply(out, margin, share)  # type: ignore[return-value]


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
        learn: what the score is trained for. ``"benefit"``: how much opening lowers the loss
            (straight-through gradient). ``"difficulty"``: whether the sample is among the hardest
            share of its batch (the budget, or half), see :func:`watch_difficulty`. None: difficulty if
            there is a budget, else benefit.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        bias: float = -2.0,
        temperature: float = 1.0,
        budget: float | None = None,
        momentum: float = 0.1,
        learn: str | None = None,
    ):
        super().__init__()
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"A gate's budget is a share of samples in (0, 1), or None; got {budget!r}.")
        if not temperature > 0:
            raise ValueError(f"A gate's temperature must be positive; got {temperature!r}.")
        if learn not in (None, "benefit", "difficulty"):
            raise ValueError(f"A gate's learn is 'benefit', 'difficulty' or None; got {learn!r}.")
        self.temperature, self.budget, self.momentum, self.learn = temperature, budget, momentum, learn
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.hidden = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.constant_(self.score.bias, bias)
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def learns_difficulty(self) -> bool:
        """Whether the score is trained for difficulty."""
        return self.learn == "difficulty" or (self.learn is None and self.budget is not None)

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
