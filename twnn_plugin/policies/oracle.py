"""The policy that knows the answers: what the choices could be worth at best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import OptionError
from .base import SelectionPolicy
from .selection import Selection, SelectionView

__all__ = ["OraclePolicy"]


class OraclePolicy(SelectionPolicy):
    """Makes for each sample the cheapest choice that gives the right answer; for analysis alone.

    It must be told what each choice comes to: :func:`twnn_plugin.selection.foreseen` tries all of them with
    the labels at hand. Where no choice is right it makes the cheapest, NOP.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan: Tensor | None = None

    @contextmanager
    def told(self, right: Tensor, cost: Tensor) -> Iterator[None]:
        """Within this it knows what each choice comes to.

        Args:
            right: (B, N + 1) bool, whether the answer is right after NOP and after each layer.
            cost: (B, N + 1) what each costs.

        Raises:
            OptionError: the two do not fit.
        """
        if right.shape != cost.shape or right.dim() != 2 or right.dtype != torch.bool:
            raise OptionError(
                "The oracle is told (B, N + 1) booleans and the costs of the same choices; got "
                f"{tuple(right.shape)} of {right.dtype} and {tuple(cost.shape)}."
            )
        price = torch.where(right, cost, torch.inf)
        price[:, 0] = torch.where(right.any(dim=1), price[:, 0], 0.0)
        before, self.plan = self.plan, price.argmin(dim=1)
        try:
            yield
        finally:
            self.plan = before

    def select(self, view: SelectionView) -> Selection:
        count = len(view.layers)
        if self.plan is None:
            raise OptionError(
                "Policy 'oracle' knows no labels. Say with twnn_plugin.selection.foreseen(model, x, labels): "
                "model(x)."
            )
        if view.rows and int(view.index.max()) >= self.plan.shape[0]:
            raise OptionError(
                f"Policy 'oracle' was told of {self.plan.shape[0]} samples; the batch has more. Foresee "
                f"the batch "
                "that the model is given."
            )
        action = self.plan[view.index] if view.step == 0 else torch.zeros_like(view.last)
        return Selection(Selection.of_actions(action, count))
