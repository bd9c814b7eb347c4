"""Studying a frozen network: what its policy sees of each sample, and what each choice would come to.

While the network does not change, its outcomes need to be worked out once. An agent can then be taught with
all of them instead of the one that it happened to draw, and any policy that decides once be judged without
running the network again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..modes import evaluating
from ..policies import Policy
from ..policies.base import SelectionPolicy
from ..policies.selection import Selection, SelectionView
from .engine import selection_of
from .foresight import Outcomes, outcomes
from .learning import Reward

__all__ = ["Study", "informed_loss", "study"]


@dataclass(frozen=True)
class Study:
    """What was seen of n samples before their first decision, and what each choice came to.

    Attributes:
        view: of the samples, in their order.
        outcomes: of NOP and of each layer, iterated once.
    """

    view: SelectionView
    outcomes: Outcomes

    def rows(self, index: Tensor) -> Study:
        """The samples at ``index``, (b,) integers."""
        found = self.outcomes
        return Study(_taken(self.view, index), Outcomes(found.logits[index], found.cost[index]))

    def choices(self, policy: Policy) -> Tensor:
        """(n,) what a policy chooses first: 0 is NOP and l + 1 layer l.

        Raises:
            OptionError: it chose several layers at once.
        """
        with torch.no_grad():
            chosen = policy.select(self.view).layers
        if bool((chosen.sum(dim=1) > 1).any()):
            raise OptionError(
                f"Policy {type(policy).__name__} iterates several layers at once; a study knows of one at "
                f"a time."
            )
        return torch.where(chosen.any(dim=1), chosen.to(torch.long).argmax(dim=1) + 1, 0)

    def judged(self, choices: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and cost of (n,) choices.

        Args:
            choices: as :meth:`choices` gives them.
            targets: (n, ...) integers.

        Returns:
            (n,) float, 1 where right; (n,) multiply-adds after the open-loop pass, as a share of it.
        """
        place = choices[:, None]
        right = self.outcomes.right(targets).gather(1, place).squeeze(1)
        return right.float(), self.outcomes.cost.gather(1, place).squeeze(1)


class _Watch(SelectionPolicy):
    """Stands in for the policy, keeps what it is shown, and chooses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[SelectionView] = []

    def select(self, view: SelectionView) -> Selection:
        self.seen.append(view)
        return Selection(torch.zeros_like(view.counts, dtype=torch.bool))


def study(model: nn.Module, x: Tensor, batch: int = 500) -> Study:
    """Run a network with every choice on every sample, in eval mode.

    Args:
        model: with a policy that picks among layers.
        x: (n, ...) what it is given.
        batch: samples a pass.

    Raises:
        OptionError: the model has no such policy, or x no samples.
    """
    selection: Any = selection_of(model)
    if selection is None or not x.shape[0]:
        raise OptionError("A study needs a model whose policy picks among layers, and at least one sample.")
    tried, views = [], []
    for part in x.split(batch):
        tried.append(outcomes(model, part))
        before, watch = selection.policy, _Watch()
        selection.policy = watch
        try:
            with evaluating(model):
                model(part)
        finally:
            selection.policy = before
        views += watch.seen
    logits = torch.cat([found.logits for found in tried])
    return Study(_joined(views), Outcomes(logits, torch.cat([found.cost for found in tried])))


def _joined(views: list[SelectionView]) -> SelectionView:
    """Views of batches as one of all samples."""
    first = views[0]
    made: dict[str, Any] = {}
    for field in fields(first):
        value = getattr(first, field.name)
        if isinstance(value, Tensor) and field.name != "prices":
            made[field.name] = torch.cat([getattr(view, field.name) for view in views])
    made["features"] = tuple(torch.cat(parts) for parts in zip(*(v.features for v in views), strict=True))
    made["index"] = torch.arange(made["last"].shape[0], device=made["last"].device)
    return replace(first, **made)


def _taken(view: SelectionView, index: Tensor) -> SelectionView:
    """Some samples of a view."""
    made: dict[str, Any] = {
        field.name: getattr(view, field.name)[index]
        for field in fields(view)
        if isinstance(getattr(view, field.name), Tensor) and field.name != "prices"
    }
    made["features"] = tuple(part[index] for part in view.features)
    return replace(view, **made)


def informed_loss(policy: Policy, part: Study, targets: Tensor, settings: Reward) -> Tensor:
    """The agent's loss with every outcome known: minus the expected reward of its first decision, a scalar.

    Its gradient is what REINFORCE estimates from one draw, without the variance (the reward's ``repeat`` and
    ``critic`` have nothing to say here).

    Args:
        policy: one that learns, and gives the distribution that it draws from.
        part: of a study, (b,) samples.
        targets: (b, ...) integers.
        settings: the reward's weights.

    Raises:
        OptionError: the policy gives no distribution.
    """
    answer = policy.select(part.view)
    if answer.distribution is None or answer.entropy is None:
        raise OptionError(
            f"Policy {type(policy).__name__} gives no distribution to learn from: put it into training "
            f"mode, or "
            "use one that learns, such as 'dynalay'."
        )
    with torch.no_grad():
        logits = part.outcomes.logits
        quality = torch.stack(
            [settings.quality(logits[:, a], targets) for a in range(logits.shape[1])], dim=1
        )
        if settings.relative:
            quality = quality - quality[:, :1]
        value = settings.alpha * quality - settings.beta * part.outcomes.cost
    expected = (answer.distribution.float() * value).sum(dim=1)
    return -settings.weight * (expected + settings.entropy * answer.entropy.float()).mean()
