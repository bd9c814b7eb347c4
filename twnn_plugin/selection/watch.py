"""A watch over the choices: where one action takes over, it says so."""

from __future__ import annotations

import warnings

import torch

from ..errors import OptionError, SelectionWarning
from .record import SelectionRecord

__all__ = ["Monitor"]


class Monitor:
    """Warns where the decisions of a selection policy collapse to one action.

    Shares are averaged over training steps with a moving average, since the batches of a few steps may well
    agree by chance. Give it the record of every step; it warns once for each action that takes over.

    Args:
        limit: the share of all decisions, in (0, 1], from which on an action has taken over.
        steps: records that the moving average looks back on, and that must have been seen, >= 1.

    Attributes:
        shares: of NOP and each layer, by name; empty before the first record.
    """

    def __init__(self, limit: float = 0.98, steps: int = 100):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= 1:
            raise OptionError(f"Option limit of the monitor must be in (0, 1]; got {limit!r}.")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"Option steps of the monitor must be a whole number >= 1; got {steps!r}.")
        self.limit, self.steps = limit, steps
        self.seen = 0
        self.shares: dict[str, float] = {}
        self.told: str | None = None

    def update(self, record: SelectionRecord) -> str | None:
        """Look at one more step; the warning's text where an action has just taken over, else None."""
        first = _first_shares(record)
        if first is None:
            return None
        keep = min(self.seen, self.steps - 1) / (min(self.seen, self.steps - 1) + 1)
        self.shares = {
            name: keep * self.shares.get(name, share) + (1 - keep) * share for name, share in first.items()
        }
        self.seen += 1
        action = max(self.shares, key=self.shares.__getitem__)
        if self.shares[action] < self.limit:
            self.told = None
            return None
        if self.seen < self.steps or self.told == action:
            return None
        self.told = action
        text = _advice(action, self.shares[action], self.steps)
        warnings.warn(text, SelectionWarning, stacklevel=2)
        return text


def _first_shares(record: SelectionRecord) -> dict[str, float] | None:
    """Shares of the first decisions: later ones of samples that iterated are NOP more often than not."""
    if not record.decisions or record.decisions[0].index.numel() == 0:
        return None
    selection = record.decisions[0].selection
    # What it would choose at inference: exploration would hide a collapse.
    chosen = selection.layers if selection.preferred is None else selection.preferred
    actions = torch.cat([~chosen.any(dim=1, keepdim=True), chosen], dim=1).to(torch.float32)
    shares = actions.mean(dim=0).tolist()
    return dict(zip(("nop", *record.layers), shares, strict=True))


def _advice(action: str, share: float, steps: int) -> str:
    head = f"The policy chose {action!r} first in {100 * share:.1f} % of the last {steps} steps' decisions"
    if action == "nop":
        return (
            f"{head}: nothing is iterated any more. Lower the reward's beta (the price of multiply-adds) or "
            "raise its entropy bonus, explore more (epsilon, final_epsilon of policy 'dynalay'), or warm the "
            "main model up for longer, so that iterating is worth something."
        )
    return (
        f"{head}: every sample is treated alike. Raise the reward's entropy bonus or epsilon of policy "
        "'dynalay', raise beta if that layer is dear, or check that other layers can be iterated "
        "(fpi_layers)."
    )
