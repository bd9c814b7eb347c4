"""The introspective agent of DynaLay: it looks at the activations and picks a layer to iterate, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .learner import LearningPolicy
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["DynaLayPolicy"]


class _Scores(NamedTuple):
    """Of each decision: (b, N + 1) logits, NOP first, and (b,) the reward that is expected."""

    logits: Tensor
    baseline: Tensor


class DynaLayPolicy(LearningPolicy):
    """The agent of Mathur & Plis (2023), section 3 and appendix A: NOP, or one of the layers.

    A perceptron on what :func:`~twnn_plugin.policies.learner.perceive` gives: pooled activations, confidence,
    cost, steps, residuals. In training the choice is drawn from its softmax, with a share ``epsilon`` of
    choices at random; at inference the most probable one is taken (the first of equals). It decides again
    after each step, until NOP.

    Its logits are scores minus ``cost_weight`` times the price of each layer. So the cost can be changed
    after training: a higher one turns choices into NOP, never the other way round.

    Args:
        hidden: width of the hidden layer.
        epsilon: share of random choices in training, in [0, 1]; see ``anneal``.
        final_epsilon: what it falls to; None: it stays.
        anneal: training steps over which it falls, linearly.
        cost_weight: subtracted from the scores per unit of price (one evaluation of the layer and of what
            follows it, as a share of the network's cost).
        temperature: logits are divided by it, > 0.
        nop_bias: initial logit of NOP: positive is cautious.
        estimator: ``"reinforce"``: the gradient of the expected reward by Williams (1992), with a learned
            baseline; ``"gumbel"``: straight-through Gumbel softmax (Jang et al. 2017), whose gradient is the
            loss's own.

    Raises:
        OptionError: an impossible value.
    """

    def __init__(
        self,
        hidden: int = 64,
        epsilon: float = 0.1,
        final_epsilon: float | None = None,
        anneal: int = 1000,
        cost_weight: float = 0.0,
        temperature: float = 1.0,
        nop_bias: float = 1.0,
        estimator: str = "reinforce",
    ):
        super().__init__("dynalay", hidden, epsilon, final_epsilon, anneal)
        check_number("dynalay", "temperature", temperature, "positive", lambda value: value > 0)
        check_number("dynalay", "cost_weight", cost_weight)
        check_number("dynalay", "nop_bias", nop_bias)
        if estimator not in ("reinforce", "gumbel"):
            raise OptionError(
                f"Option estimator of policy 'dynalay' is 'reinforce' or 'gumbel'; got {estimator!r}."
            )
        self.estimator = estimator
        self.cost_weight, self.temperature, self.nop_bias = cost_weight, temperature, nop_bias

    def build(self, inputs: int, layers: int) -> None:
        self.choose_among(inputs, layers + 1, self.nop_bias)

    def decide(self, view: SelectionView) -> Selection:
        scores = self.scores(view)
        count = len(view.layers)
        if not self.training:
            return Selection(Selection.of_actions(scores.logits.argmax(dim=1), count))
        drawn = self.drawn(view, scores.logits, scores.baseline)
        if self.estimator == "reinforce" or not view.rows:
            return drawn
        share = self.exploring()
        mixed = (1 - share) * scores.logits.softmax(dim=1) + share / (count + 1)
        soft = nn.functional.gumbel_softmax(mixed.clamp_min(1e-12).log(), tau=self.temperature)
        action = soft.argmax(dim=1)
        picked = soft.gather(1, action[:, None]).squeeze(1)
        return replace(
            drawn,
            layers=Selection.of_actions(action, count),
            log_prob=mixed.gather(1, action[:, None]).squeeze(1).clamp_min(1e-12).log(),
            weight=1 + picked - picked.detach(),
        )

    def scores(self, view: SelectionView) -> _Scores:
        """The logits of NOP and of each layer, and the expected reward."""
        inputs = self.perceived(view)
        with torch.autocast(inputs.device.type, enabled=False):
            logits = self.score(self.body(inputs))
            baseline = self.value(inputs).squeeze(1)
        offset = torch.cat([view.prices.new_zeros(1), view.prices]).to(logits) * self.cost_weight
        return _Scores((logits - offset) / self.temperature, baseline)
