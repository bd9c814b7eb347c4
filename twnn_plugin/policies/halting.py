"""Halting: go on computing, in a given order, until it is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import OptionError, nearest
from .learner import LearningPolicy
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["HaltingPolicy"]


class HaltingPolicy(LearningPolicy):
    """After each step, halt or go on: the layers are iterated one after the other, in a fixed order.

    As in PonderNet (Banino et al. 2021) a network gives the probability of halting at each step, and is held
    to a geometric prior by the Kullback-Leibler divergence to it, which takes the place of the entropy
    bonus; as in SkipNet (Wang et al. 2018) it learns from the reward by REINFORCE. At inference it halts
    where that probability is at least one half.

    Args:
        order: names of layers, each at most once, in the order in which they are iterated; None: from the
            last to the first, which is the cheapest first, as what follows a layer is computed again.
        hidden: width of the hidden layer.
        prior: probability of halting that the prior has at each step, in (0, 1).
        epsilon: share of random choices in training.
        cost_weight: subtracted from the logit of going on, per unit of price.

    Raises:
        OptionError: an impossible value.
    """

    def __init__(
        self,
        order: Sequence[str] | None = None,
        hidden: int = 64,
        prior: float = 0.7,
        epsilon: float = 0.1,
        cost_weight: float = 0.0,
    ):
        super().__init__("halting", hidden, epsilon, None, 1)
        check_number("halting", "prior", prior, "in (0, 1)", lambda value: 0 < value < 1)
        check_number("halting", "cost_weight", cost_weight)
        if order is not None and (isinstance(order, str) or not isinstance(order, Sequence)):
            raise OptionError(
                f"Option order of policy 'halting' must be a list of layers' names; got {order!r}."
            )
        self.order = None if order is None else tuple(order)
        self.prior, self.cost_weight = prior, cost_weight

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        for name in self.order or ():
            if name not in layers:
                raise OptionError(
                    f"Option order of policy 'halting' names layers of {', '.join(layers)}; got {name!r}."
                    f"{nearest(name, list(layers))}"
                )
        if self.order is not None and (not self.order or len(set(self.order)) != len(self.order)):
            raise OptionError(
                f"Option order of policy 'halting' names layers, each once; got {self.order!r}."
            )
        super().bind(layers, widths)

    def build(self, inputs: int, layers: int) -> None:
        self.halt = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        self.value = nn.Sequential(nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        last: nn.Module = self.halt[2]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, math.log(self.prior / (1 - self.prior)))

    def decide(self, view: SelectionView) -> Selection:
        order = tuple(reversed(view.layers)) if self.order is None else self.order
        count = len(view.layers)
        if view.step >= len(order):
            return Selection(torch.zeros(view.rows, count, dtype=torch.bool, device=view.last.device))
        place = view.layers.index(order[view.step])
        inputs = self.perceived(view)
        with torch.autocast(inputs.device.type, enabled=False):
            halt = self.halt(inputs).squeeze(1) + self.cost_weight * view.prices[place].to(inputs.dtype)
            baseline = self.value(inputs).squeeze(1)
        # NOP and this one layer; the others cannot be chosen.
        logits = torch.full((view.rows, count + 1), -torch.inf, dtype=halt.dtype, device=halt.device)
        logits[:, 0], logits[:, place + 1] = nn.functional.logsigmoid(halt), nn.functional.logsigmoid(-halt)
        if not self.training:
            return Selection(Selection.of_actions(logits.argmax(dim=1), count))
        return replace(self.drawn(view, logits, baseline), entropy=-self._divergence(halt))

    def _divergence(self, halt: Tensor) -> Tensor:
        """(b,) of each step's halting from the prior's."""
        p = halt.sigmoid()
        log_p, log_q = nn.functional.logsigmoid(halt), nn.functional.logsigmoid(-halt)
        return p * (log_p - math.log(self.prior)) + (1 - p) * (log_q - math.log1p(-self.prior))
