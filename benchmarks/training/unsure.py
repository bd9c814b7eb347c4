"""The gate of the comparisons: open where the closed network's answer is unsure."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from twnn_plugin.gates.following import followed
from twnn_plugin.policies import Policy
from twnn_plugin.types import PolicyView

__all__ = ["Unsure", "entropy"]


class Unsure(Policy):
    """Opens where the closed head's prediction has a high entropy.

    In use, above a threshold: each sample is decided about by itself. In training, for a share of each batch,
    since a threshold would open ever fewer samples as the network gets sure of itself.

    Args:
        model: with a closed head and one wormhole, whose source's open-loop output is looked at.
        source: path of the source, a stage of timm's basic blocks.
        threshold: nats; infinite: none opens.
        share: in [0, 1], of the samples of a batch in training, those of the highest entropy.

    Attributes:
        following: (share, rate) that the threshold goes after in use, as learned gates do; None: it stays.
    """

    def __init__(self, model: nn.Module, source: str, threshold: float = math.inf, share: float = 1.0):
        super().__init__()
        self.threshold, self.share = threshold, share
        self.following: tuple[float, float] | None = None
        self._spread = torch.tensor(-1.0)
        self._answer = [model]  # in a list: the model is not a child of its own policy
        self._out: Tensor | None = None
        # The innermost module that gives the stage's output: the wormhole replaces it further out, or later.
        last: Any = list(model.get_submodule(source).children())[-1]
        self._hook = last.act2.register_forward_hook(self._keep, prepend=True)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._out = output

    def forward(self, view: PolicyView) -> Tensor:
        model: Any = self._answer[0]
        assert self._out is not None
        with torch.no_grad():
            found = entropy(model.closed_head.heads[0](model.global_pool(self._out)))
        if not self.training:
            opens = found > self.threshold
            if self.following is not None:
                moved = followed(torch.tensor(self.threshold), self._spread, found.cpu(), *self.following)
                self.threshold, self._spread = float(moved[0]), moved[1]
            return opens
        most = found.topk(round(self.share * len(found))).indices
        return torch.zeros_like(found, dtype=torch.bool).index_fill(0, most, True)

    def leave(self) -> None:
        """Look at the model no more."""
        self._hook.remove()


def entropy(logits: Tensor) -> Tensor:
    """(N,) in nats."""
    return torch.distributions.Categorical(logits=logits.float()).entropy()
