"""Trying every choice, for the oracle and for studies of what choices are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..modes import evaluating
from ..policies.base import SelectionPolicy
from ..policies.oracle import OraclePolicy
from ..policies.selection import Selection, SelectionView
from .engine import selection_of

__all__ = ["Outcomes", "foreseen", "outcomes"]


@dataclass(frozen=True)
class Outcomes:
    """What each choice comes to, if it is the only one: NOP first, then each layer.

    Attributes:
        logits: (B, N + 1, K, ...).
        cost: (B, N + 1) multiply-adds after the open-loop pass, as a share of it.
    """

    logits: Tensor
    cost: Tensor

    def right(self, targets: Tensor) -> Tensor:
        """(B, N + 1) bool: the prediction is right, at every position where there are some.

        Args:
            targets: (B, ...) integers, one for each prediction.

        Raises:
            OptionError: they are not one for each prediction.
        """
        wanted = (self.logits.shape[0], *self.logits.shape[3:])
        if tuple(targets.shape) != wanted:
            raise OptionError(
                f"There must be one label for each prediction, of shape {wanted}; got "
                f"{tuple(targets.shape)}. Give the labels of the very samples that the model was given."
            )
        found = self.logits.argmax(dim=2) == targets.unsqueeze(1)
        return found if found.dim() == 2 else found.flatten(2).all(dim=2)


class _One(SelectionPolicy):
    """One choice for all samples, once."""

    def __init__(self, action: int):
        super().__init__()
        self.action = action

    def select(self, view: SelectionView) -> Selection:
        actions = torch.full_like(view.last, self.action if view.step == 0 else 0)
        return Selection(Selection.of_actions(actions, len(view.layers)))


def outcomes(model: nn.Module, x: Tensor) -> Outcomes:
    """Try every choice on a batch: N + 1 passes in eval mode.

    Args:
        model: with a policy that picks among layers.
        x: (B, ...) what it is given.

    Raises:
        OptionError: the model has no such policy.
    """
    selection = selection_of(model)
    if selection is None:
        raise OptionError(
            f"This {type(model).__name__} has no layers to choose among. Create it as 'dynalay_<name>'."
        )
    policy, last = selection.policy, selection.last
    logits, cost = [], []
    try:
        for action in range(len(selection.iterated) + 1):
            selection.policy = _One(action)
            with evaluating(model):
                logits.append(model(x))
            assert selection.last is not None
            cost.append(selection.last.spent)
    finally:
        selection.policy, selection.last = policy, last
    return Outcomes(torch.stack(logits, dim=1), torch.stack(cost, dim=1))


@contextmanager
def foreseen(model: nn.Module, x: Tensor, targets: Tensor) -> Iterator[Outcomes]:
    """Within this, the oracle of ``model`` knows what each choice comes to on ``x``, and ``model(x)``
    follows it.

    Args:
        model: its policy is ``"oracle"``.
        x: (B, ...) what it is given.
        targets: (B, ...) integers.

    Raises:
        OptionError: its policy is another one, or there is not one label for each sample.
    """
    selection = selection_of(model)
    if selection is None or not isinstance(selection.policy, OraclePolicy):
        name = "none" if selection is None else type(selection.policy).__name__
        raise OptionError(
            f"Only an oracle foresees; the policy of this model is {name}. tw.configure(model, "
            f"policy='oracle')."
        )
    if targets.dim() == 0 or targets.shape[0] != x.shape[0]:  # before the passes are paid for
        raise OptionError(
            f"There must be one label for each of the {x.shape[0]} samples; got labels of shape "
            f"{tuple(targets.shape)}."
        )
    tried = outcomes(model, x)
    with selection.policy.told(tried.right(targets), tried.cost):
        yield tried
