"""The introspective agent of DynaLay: it looks at the activations and picks a layer to iterate, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .base import SelectionPolicy
from .selection import Selection, SelectionView

__all__ = ["DynaLayPolicy"]

_METRICS = 4  # entropy, cost, step and repeats; and each layer's count and residual


class _Scores(NamedTuple):
    """Of each decision: (b, N + 1) logits, NOP first, and (b,) the reward that is expected."""

    logits: Tensor
    baseline: Tensor


class DynaLayPolicy(SelectionPolicy):
    """The agent of Mathur & Plis (2023), section 3 and appendix A: NOP, or one of the layers.

    A perceptron on the layer-normalised pooled activations of every layer, the entropy of the present
    prediction, the cost and the number of steps so far, how often each layer was iterated and how far
    it is from rest. In training the choice is drawn from its softmax, with a share ``epsilon`` of choices
    at random; at inference the most probable one is taken (the first of equals). It decides again after
    each step, until NOP.

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
        super().__init__()
        for name, value in (("hidden", hidden), ("anneal", anneal)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(
                    f"Option {name} of policy 'dynalay' must be a whole number >= 1; got {value!r}."
                )
        for name, share in (("epsilon", epsilon), ("final_epsilon", final_epsilon)):
            if share is not None and not 0 <= share <= 1:
                raise OptionError(f"Option {name} of policy 'dynalay' must be in [0, 1]; got {share!r}.")
        if not temperature > 0:
            raise OptionError(
                f"Option temperature of policy 'dynalay' must be positive; got {temperature!r}."
            )
        if estimator not in ("reinforce", "gumbel"):
            raise OptionError(
                f"Option estimator of policy 'dynalay' is 'reinforce' or 'gumbel'; got {estimator!r}."
            )
        self.hidden, self.anneal, self.estimator = hidden, anneal, estimator
        self.epsilon, self.final_epsilon = epsilon, epsilon if final_epsilon is None else final_epsilon
        self.cost_weight, self.temperature, self.nop_bias = cost_weight, temperature, nop_bias
        self.layers: tuple[str, ...] = ()
        self.widths: tuple[int, ...] = ()
        self.body: nn.Module | None = None
        self.trained: Tensor
        self.register_buffer("trained", torch.zeros((), dtype=torch.long))

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        if self.layers and (self.layers, self.widths) != (tuple(layers), tuple(widths)):
            raise OptionError(
                f"This agent was made for another network: it knows the layers {', '.join(self.layers)} of "
                f"widths {self.widths}; it was given {', '.join(layers)} of widths {tuple(widths)}. Make one "
                "for each network."
            )
        if self.layers:
            return
        self.layers, self.widths = tuple(layers), tuple(widths)
        inputs = sum(widths) + _METRICS + 2 * len(layers)
        self.body = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU())
        self.score = nn.Linear(self.hidden, len(layers) + 1)
        # The reward is estimated apart, so that fitting it does not move the choices.
        self.value = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)
        with torch.no_grad():
            self.score.bias[0] = self.nop_bias

    def exploring(self) -> float:
        """The present share of random choices in training."""
        done = min(1.0, float(self.trained) / self.anneal)
        return self.epsilon + done * (self.final_epsilon - self.epsilon)

    def select(self, view: SelectionView) -> Selection:
        scores = self.scores(view)
        count = len(view.layers)
        if not self.training:
            return Selection(Selection.of_actions(scores.logits.argmax(dim=1), count))
        share = self.exploring()
        log_p = scores.logits.log_softmax(dim=1)
        probability = log_p.exp()
        # The distribution that is really drawn from, or the gradient would be biased.
        mixed = (1 - share) * probability + share / (count + 1)
        weight = None
        if self.estimator == "gumbel":
            soft = nn.functional.gumbel_softmax(mixed.clamp_min(1e-12).log(), tau=self.temperature)
            action = soft.argmax(dim=1)
            picked = soft.gather(1, action[:, None]).squeeze(1)
            weight = 1 + picked - picked.detach()
        else:
            action = torch.multinomial(mixed.detach(), 1).squeeze(1) if view.rows else view.last
        price = torch.cat([view.prices.new_zeros(1), view.prices]).to(mixed.dtype)
        return Selection(
            Selection.of_actions(action, count),
            log_prob=mixed.gather(1, action[:, None]).squeeze(1).clamp_min(1e-12).log(),
            entropy=-(probability * log_p).sum(dim=1),
            expected_price=mixed @ price,
            baseline=scores.baseline,
            weight=weight,
        )

    def scores(self, view: SelectionView) -> _Scores:
        """The logits of NOP and of each layer, and the expected reward."""
        if self.body is None:
            raise OptionError("This agent belongs to no network yet: call bind(layers, widths) first.")
        dtype = self.score.weight.dtype
        parts = [nn.functional.layer_norm(f, f.shape[1:]) for f in view.features]
        metrics = torch.stack(
            [
                view.entropy,
                view.spent,
                torch.full_like(view.entropy, view.step),
                view.repeats.to(view.entropy.dtype),
            ],
            dim=1,
        )
        rest = view.residual.clamp_min(1e-8).log10() / 8 + 1  # 0 at 1e-8 and below, 1 at 1
        inputs = torch.cat([*parts, metrics, view.counts, rest], dim=1).to(dtype)
        # A broken sample must not reach the weights: zero times NaN is NaN.
        inputs = torch.where(torch.isfinite(inputs).all(dim=1, keepdim=True), inputs, 0.0)
        with torch.autocast(inputs.device.type, enabled=False):
            logits = self.score(self.body(inputs))
            baseline = self.value(inputs).squeeze(1)
        offset = torch.cat([view.prices.new_zeros(1), view.prices]).to(logits) * self.cost_weight
        return _Scores((logits - offset) / self.temperature, baseline)

    def stepped(self) -> None:
        """Called once for each training step: the share of random choices falls."""
        self.trained += 1
