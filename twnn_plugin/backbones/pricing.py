"""What a replay costs, counted again after a change of budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..blocks import Feedback
from ..blocks.prices import set_prices
from ..blocks.wormhole import Wormhole
from ..errors import OptionError
from ..gates import LearnedGate
from ..modes import evaluating
from ..trees import rebuild
from .attach import Holder, known_backbone
from .survey import run

__all__ = ["renew_prices", "unchanged_on_error"]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Within this, an exception leaves the budgets, prices and thresholds of a model's gates as they were."""
    parts = [m for m in model.modules() if isinstance(m, Feedback)]
    gates = [part.gate for part in parts if isinstance(part.gate, LearnedGate)]
    kept = [(g, g.budget, g.temperature, g.threshold, g.effort, g.price.clone()) for g in gates]
    records = [part.last for part in parts]
    try:
        yield
    except BaseException:
        for gate, budget, temperature, threshold, effort, price in kept:
            gate.budget, gate.temperature = budget, temperature
            gate.threshold, gate.effort = threshold, effort
            gate.price.copy_(price)
        for part, record in zip(parts, records, strict=True):
            part.last = record
        raise


def renew_prices(model: nn.Module) -> None:
    """After a change of budget: what a replay costs, which nobody needed to know before.

    Raises:
        OptionError: a budget is in multiply-adds, and no input is known that the model runs with.
    """
    priced: set[int] = set()
    for block in [m for m in model.modules() if isinstance(m, Wormhole)]:
        set_prices(block, [block.feedback], lambda block=block: block(block.example))
        priced.add(id(block.feedback))
    for owner in [m for m in model.modules() if _holder(m) is not None]:
        _price(owner, _wormholes(owner, priced))
        priced.update(id(part) for part in _wormholes(owner, priced))
    _price(model, _wormholes(model, priced))


def _holder(model: nn.Module) -> Holder | None:
    return next((child for child in model.children() if isinstance(child, Holder)), None)


def _wormholes(model: nn.Module, but: set[int]) -> list[Feedback]:
    return [m for m in model.modules() if isinstance(m, Feedback) and id(m) not in but]


def _price(model: nn.Module, parts: list[Feedback]) -> None:
    if any(isinstance(part.gate, LearnedGate) and part.gate.counts_cost() for part in parts):
        set_prices(model, parts, _forward(model))


def _forward(model: nn.Module) -> Callable[[], Any]:
    """A pass through a model with one sample."""
    errors: list[str] = []
    for example in _examples(model):
        try:
            with evaluating(model):
                run(model, example)
        except Exception as error:  # whatever the model trips over: a size, a device
            errors.append(str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__)
            continue
        return lambda example=example: run(model, example)
    tried = f" ({'; '.join(dict.fromkeys(errors))})" if errors else ""
    raise OptionError(
        f"No input is known that this {type(model).__name__} runs with{tried}, so that its multiply-adds "
        "cannot be counted. Give attach one: example=..., or give the budget as a share or in rows."
    )


def _examples(model: nn.Module) -> Iterator[Any]:
    """Inputs of one sample: the one that ``attach`` was given, then those that an adapter knows."""
    holder = _holder(model)
    if holder is not None and holder.example is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), None)

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or like is None:
                return leaf
            return leaf.to(like.device, like.dtype if leaf.is_floating_point() else None)

        yield rebuild(holder.example, moved)
    backbone = known_backbone(model)
    if backbone is not None:
        for inputs in backbone.examples(model, [1]):
            yield inputs[0]
