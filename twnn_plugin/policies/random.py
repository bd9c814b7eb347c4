"""The policy that tosses a coin: the control every learned policy must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Policy, PolicyView
from .drawing import check_weights, drawn_layers
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["RandomPolicy"]


class RandomPolicy(Policy):
    """Iterates each sample with probability ``p``, drawn from torch's global generator.

    Among layers: with probability ``p`` one of them, once.

    Args:
        p: probability in [0, 1].
        weights: among layers, how much more often each is drawn than the others, >= 0; None: all alike.

    Raises:
        OptionError: an impossible value.
    """

    def __init__(self, p: float = 0.5, weights: Sequence[float] | None = None):
        super().__init__()
        check_number("random", "p", p, "in [0, 1]", lambda value: 0 <= value <= 1)
        self.p = p
        self.weights = check_weights("random", weights)

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        check_weights("random", self.weights, layers)

    def forward(self, view: PolicyView) -> Tensor:
        return torch.rand(view.open.shape, device=view.open.device) < self.p

    def select(self, view: SelectionView) -> Selection:
        picked = drawn_layers(view, self.weights)
        goes = (torch.rand(view.rows, device=picked.device) < self.p) & (view.step == 0)
        return Selection(Selection.of_actions(torch.where(goes, picked + 1, 0), len(view.layers)))
