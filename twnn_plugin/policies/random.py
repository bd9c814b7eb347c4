"""The policy that tosses a coin: the control every learned policy must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Policy, PolicyView
from .selection import Selection, SelectionView

__all__ = ["RandomPolicy"]


class RandomPolicy(Policy):
    """Iterates each sample with probability ``p``, drawn from torch's global generator.

    Among layers: with probability ``p`` one of them, once.

    Args:
        p: probability in [0, 1].
        weights: among layers, how much more often each is drawn than the others, >= 0; None: all alike.
    """

    def __init__(self, p: float = 0.5, weights: Sequence[float] | None = None):
        super().__init__()
        if not 0 <= p <= 1:
            raise OptionError(f"Option p of policy 'random' must be in [0, 1]; got {p!r}.")
        if weights is not None and (min(weights, default=0) < 0 or not sum(weights) > 0):
            raise OptionError(
                "Option weights of policy 'random' must be numbers >= 0 that sum to more than 0; got "
                f"{weights!r}."
            )
        self.p = p
        self.weights = None if weights is None else tuple(float(w) for w in weights)

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        if self.weights is not None and len(self.weights) != len(layers):
            raise OptionError(
                f"Option weights of policy 'random' needs one number for each of the {len(layers)} layers "
                f"{', '.join(layers)}; got {len(self.weights)}."
            )

    def forward(self, view: PolicyView) -> Tensor:
        return torch.rand(view.open.shape, device=view.open.device) < self.p

    def select(self, view: SelectionView) -> Selection:
        count, device = len(view.layers), view.last.device
        share = torch.ones(count, device=device)
        if self.weights is not None:
            share = torch.tensor(self.weights, device=device)
        picked = torch.multinomial(share, view.rows, replacement=True) if view.rows else view.last
        goes = (torch.rand(view.rows, device=device) < self.p) & (view.step == 0)
        return Selection(Selection.of_actions(torch.where(goes, picked + 1, 0), count))
