"""What an agent learns from: the reward of Mathur & Plis (2023), equations 2 and 3, and its gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from ..policies.numbers import is_number
from .record import SelectionRecord

__all__ = ["MEASURES", "Reward", "closed_loss", "policy_loss", "reward"]

MEASURES = ("accuracy", "probability", "likelihood")
"""How the quality of a prediction can be measured."""


@dataclass(frozen=True)
class Reward:
    """Weights of the reward and of the agent's loss.

    ``R = alpha * quality - beta * cost - repeat * repeats``; the total loss is ``L = CE - lambda R``.

    Attributes:
        alpha: weight of the quality of the prediction, >= 0.
        beta: weight of the cost, as a share of the network's multiply-adds, >= 0.
        repeat: penalty for each choice of the same layer that follows another, >= 0.
        weight: lambda, of the agent in the total loss, > 0.
        measure: ``"accuracy"``: 1 where the prediction is right; ``"probability"``: that of the truth, the
            accuracy expected of an answer drawn from the prediction, which moves with every change;
            ``"likelihood"``: its logarithm, at least ``floor``, in which a few confident mistakes weigh most.
        floor: of the likelihood, negative.
        critic: weight of the squared error of the learned baseline, >= 0.
        entropy: weight of the entropy bonus, >= 0.
        relative: count the quality against that of the open-loop prediction, which NOP would have given. The
            best choices are the same, and the variance of the estimate falls several times.

    Raises:
        OptionError: an impossible value.
    """

    alpha: float = 0.5
    beta: float = 0.3
    repeat: float = 0.05
    weight: float = 0.2
    measure: str = "accuracy"
    floor: float = -4.0
    critic: float = 0.5
    entropy: float = 0.01
    relative: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "repeat", "critic", "entropy"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise OptionError(f"Option {name} of the reward must be a finite number >= 0; got {value!r}.")
        if self.alpha + self.beta <= 0:
            raise OptionError("The reward's alpha and beta are both 0: it says nothing. Set one of them.")
        if not is_number(self.weight) or self.weight <= 0:
            raise OptionError(
                f"Option weight of the reward must be a positive, finite number; got {self.weight!r}."
            )
        if self.measure not in MEASURES:
            raise OptionError(f"Option measure of the reward is one of {MEASURES}; got {self.measure!r}.")
        if not is_number(self.floor) or self.floor >= 0:
            raise OptionError(
                f"Option floor of the reward must be a negative, finite number; got {self.floor!r}."
            )

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) of logits (B, K, ...) and targets (B, ...): the mean over positions where there are some.

        A prediction that is not a number is as bad as one can be: 0, or the likelihood's ``floor``. One such
        sample would else make the loss of the whole batch NaN, and then the agent's weights.
        """
        if self.measure == "accuracy":
            value = ((logits.argmax(dim=1) == targets) & ~logits.isnan().any(dim=1)).float()
        else:
            value = -F.cross_entropy(logits.float(), targets, reduction="none")
            value = value.nan_to_num(nan=-math.inf, neginf=-math.inf)
            value = value.exp() if self.measure == "probability" else value.clamp_min(self.floor)
        return value if value.dim() == 1 else value.flatten(1).mean(dim=1)


@torch.no_grad()
def reward(record: SelectionRecord, logits: Tensor, targets: Tensor, settings: Reward) -> Tensor:
    """(B,) the reward of each sample of the last pass (equation 2).

    Args:
        record: of the pass.
        logits: (B, K, ...) what it returned.
        targets: (B, ...) integers.
        settings: the reward's weights.
    """
    value = settings.alpha * settings.quality(logits.detach(), targets) - settings.beta * record.spent
    for decision in record.decisions:
        value = value.index_add(0, decision.index, -settings.repeat * decision.repeats.to(value.dtype))
    return value


def policy_loss(record: SelectionRecord, logits: Tensor, targets: Tensor, settings: Reward) -> Tensor:
    """The agent's part of the total loss (equation 3), a scalar; zero for policies that do not learn.

    REINFORCE (Williams 1992): each decision is credited with the quality of the prediction and with
    the cost and the penalties from it on, less what was expected.
    Where the choice has a gradient of its own (straight-through), the cross-entropy teaches it, and this adds
    the expected cost.

    Args:
        record: of a pass in training.
        logits: (B, K, ...) what it returned.
        targets: (B, ...) integers.
        settings: the reward's weights.

    Returns:
        Whose gradient reaches the policy alone.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    batch = max(record.first.shape[0], 1)
    with torch.no_grad():
        quality = settings.quality(logits.detach(), targets)
        if settings.relative:
            quality = quality - settings.quality(record.first, targets)
        to_go = settings.alpha * quality
    for decision in reversed(record.decisions):
        chosen, index = decision.selection, decision.index
        with torch.no_grad():
            own = settings.beta * decision.price + settings.repeat * decision.repeats
            to_go = to_go.index_add(0, index, -own.to(to_go.dtype))
        if chosen.weight is not None:
            assert chosen.expected_price is not None
            total = total + settings.beta * chosen.expected_price.float().sum() / batch
        elif chosen.log_prob is not None:
            gained = to_go[index]
            expected = torch.zeros_like(gained) if chosen.baseline is None else chosen.baseline.float()
            advantage = (gained - expected).detach()
            total = total - (advantage * chosen.log_prob.float()).sum() / batch
            total = total + settings.critic * (expected - gained).square().sum() / batch
        if chosen.entropy is not None:
            total = total - settings.entropy * chosen.entropy.float().sum() / batch
    return settings.weight * total


def closed_loss(
    record: SelectionRecord, targets: Tensor, weight: float = 0.5, smoothing: float = 0.0
) -> Tensor:
    """``weight`` times the cross-entropy of the open-loop prediction, over every sample: a scalar.

    Without it, the open-loop pass learns from the samples alone that chose NOP, and a network that iterates
    much forgets how to answer at once.

    Args:
        record: of a pass in training.
        targets: (B, ...) integers, or (B, K) shares of labels.
        weight: >= 0.
        smoothing: of the labels, in [0, 1).

    Raises:
        OptionError: an impossible weight or smoothing.
    """
    if not is_number(weight) or weight < 0:
        raise OptionError(f"The closed loss needs a finite weight >= 0; got {weight!r}.")
    if not is_number(smoothing) or not 0 <= smoothing < 1:
        raise OptionError(f"The closed loss needs a smoothing of at least 0 and below 1; got {smoothing!r}.")
    return weight * F.cross_entropy(record.closed.float(), targets, label_smoothing=smoothing)
