"""What a replay costs against a pass of the plain network, for budgets in multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import OptionError
from ..gates import LearnedGate
from ..gates.constant import AlwaysGate, NeverGate
from ..modes import evaluating
from .count import counting
from .feedback import Feedback

__all__ = ["check_prices", "set_prices"]


def set_prices(model: nn.Module, parts: Sequence[Feedback], forward: Callable[[], Any]) -> None:
    """Tell the gates whose budget is in multiply-adds what a replay costs.

    Counted on a pass with the wormhole closed and one with it open for a single replay. Wormholes that are
    solved together have the price of their group, and all groups share the budget evenly. Nothing is
    done where no gate has such a budget, or the model is on the meta device.

    Args:
        model: what the parts belong to.
        parts: its wormholes.
        forward: a pass through it.

    Raises:
        OptionError: the model's multiply-adds cannot be counted.
    """
    if not _priced(parts):
        return
    plain = _plain(model, parts, forward)
    groups = _groups(parts)
    for group in groups:
        price = (_count(model, parts, forward, group) - plain) / plain * len(groups)
        for part in group:
            if isinstance(part.gate, LearnedGate):
                part.gate.price.fill_(price)
    for part in parts:
        part.last = None


def check_prices(model: nn.Module, parts: Sequence[Feedback], forward: Callable[[], Any]) -> None:
    """Refuse what :func:`set_prices` would, of a model that the parts are yet to be attached to.

    Args:
        model: the model.
        parts: what its wormholes will be.
        forward: a pass through it.

    Raises:
        OptionError: the model's multiply-adds cannot be counted.
    """
    if _priced(parts):
        _plain(model, (), forward)


def _priced(parts: Sequence[Feedback]) -> bool:
    """Whether a gate wants to know what a replay costs, and passes can be made to tell."""
    if not any(isinstance(part.gate, LearnedGate) and part.gate.counts_cost() for part in parts):
        return False
    # A model without values makes no pass: its prices come with the weights, as buffers.
    return not any(p.is_meta for part in parts for p in part.parameters())


def _plain(model: nn.Module, parts: Sequence[Feedback], forward: Callable[[], Any]) -> int:
    """Multiply-adds of a pass in which nothing is open."""
    plain = _count(model, parts, forward, ())
    if plain == 0:
        raise OptionError("The multiply-adds of this model cannot be counted; give budget as a share.")
    return plain


def _groups(parts: Sequence[Feedback]) -> list[list[Feedback]]:
    """Wormholes by what they are solved with, as of the last pass."""
    groups: dict[str, list[Feedback]] = {}
    for part in parts:
        assert part.last is not None
        groups.setdefault(part.last.group or part.span, []).append(part)
    return list(groups.values())


def _count(
    model: nn.Module, parts: Sequence[Feedback], forward: Callable[[], Any], opened: Sequence[Feedback]
) -> int:
    with evaluating(model), _one_replay(parts, opened), counting() as counter:
        forward()
    return counter.get_total_flops()


@contextmanager
def _one_replay(parts: Sequence[Feedback], opened: Sequence[Feedback]) -> Iterator[None]:
    """Some wormholes open for all samples, for one replay; all others closed."""
    kept = [(part.gate, part.policy, part.settings) for part in parts]
    try:
        for part in parts:
            # In the place of the gates, whose own work belongs to neither side.
            part.gate = AlwaysGate() if any(part is p for p in opened) else NeverGate()
            part.policy = None
            part.settings = part.settings.changed(solver="picard", max_iter=1)
        yield
    finally:
        for part, (gate, policy, settings) in zip(parts, kept, strict=True):
            part.gate, part.policy, part.settings = gate, policy, settings
