"""The controller of the first paper: after a span it picks the next stage."""

from __future__ import annotations

import torch
from torch import Tensor

from .learner import LearningPolicy
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["ControllerPolicy"]


class ControllerPolicy(LearningPolicy):
    """After a span, back to a stage, forward, or skipping a stage whose input and output shapes agree.

    Habiba & Pearlmutter (2021), figure 1: the Fixed-Point-Iterator block returns its output and the next
    layer to be run; if that is a previous layer the pass is pushed backward, else it goes on, and a block
    may be left out on the way. Here a sample's moves are, each time it decides: forward to the answer (NOP);
    back to a stage, which is iterated to its fixed point, and forward again; or the same, skipping the stage
    after it. The first pass through the network is whole, since the controller decides from its activations.

    Args:
        hidden: width of the hidden layer.
        epsilon: share of random moves in training, in [0, 1]; see ``anneal``.
        final_epsilon: what it falls to; None: it stays.
        anneal: training steps over which it falls, linearly.
        cost_weight: subtracted from the scores of going back, per unit of price; a skip does not lower it.
        forward_bias: initial logit of going forward.

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
        forward_bias: float = 1.0,
    ):
        super().__init__("twnn_controller", hidden, epsilon, final_epsilon, anneal)
        check_number("twnn_controller", "cost_weight", cost_weight)
        check_number("twnn_controller", "forward_bias", forward_bias)
        self.cost_weight, self.forward_bias = cost_weight, forward_bias

    def build(self, inputs: int, layers: int) -> None:
        self.choose_among(inputs, 1 + 2 * layers, self.forward_bias)

    def decide(self, view: SelectionView) -> Selection:
        inputs = self.perceived(view)
        with torch.autocast(inputs.device.type, enabled=False):
            scores = self.score(self.body(inputs))
            baseline = self.value(inputs).squeeze(1)
        price = torch.cat([view.prices.new_zeros(1), view.prices, view.prices]).to(scores)
        logits = (scores - self.cost_weight * price).masked_fill(self._impossible(view), -torch.inf)
        best = logits.detach().argmax(dim=1)
        if not self.training:
            return Selection(self._back(best, view), skip=self._skipped(best, view))
        action, mixed, entropy = self.draw(logits)
        return Selection(
            self._back(action, view),
            skip=self._skipped(action, view),
            log_prob=mixed.gather(1, action[:, None]).squeeze(1).clamp_min(1e-12).log(),
            entropy=entropy,
            expected_price=mixed @ price,
            baseline=baseline,
            preferred=self._back(best, view),
        )

    def _impossible(self, view: SelectionView) -> Tensor:
        """(1 + 2 N,) bool: to skip a stage that changes the shape, or that is none to choose from."""
        adjacent = view.adjacent[1:] or (True,) * (len(view.layers) - 1)
        following = [not (ok and next_) for ok, next_ in zip(view.skippable[1:], adjacent, strict=True)]
        following.append(True)  # nothing follows the last one
        flags = [False] * (1 + len(view.layers)) + following
        return torch.tensor(flags, device=view.last.device)

    def _back(self, action: Tensor, view: SelectionView) -> Tensor:
        """(b, N) bool: the stage that an action goes back to."""
        count = len(view.layers)
        return Selection.of_actions(torch.where(action > count, action - count, action), count)

    def _skipped(self, action: Tensor, view: SelectionView) -> Tensor:
        """(b, N) bool: the stage that it skips, the one after."""
        count = len(view.layers)
        skips = action > count
        return Selection.of_actions(torch.where(skips, action - count + 1, 0).clamp(max=count), count)
