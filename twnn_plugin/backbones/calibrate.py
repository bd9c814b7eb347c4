"""Setting the thresholds of trained gates from data at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..blocks.prices import set_prices
from ..blocks.wormhole import Wormhole
from ..errors import AttachError, OptionError
from ..gates import LearnedGate
from ..modes import evaluating
from .attach import known_backbone
from .survey import run

__all__ = ["calibrate", "renew_prices"]

Model = TypeVar("Model", bound=nn.Module)

_ROUNDS = 3  # replays, and the scores of later wormholes, depend on who is open


def calibrate(model: Model, batches: Iterable[Any], budget: float | str | None = None) -> Model:
    """Set the thresholds so that the budget holds on the given samples, in eval mode.

    The threshold that was followed in training is that of training samples, in training mode, while the
    weights were still moving. Use validation data, never the test set.

    Args:
        model: a model with wormholes whose gates learn.
        batches: inputs, or tuples that begin with inputs, on the model's device; iterated several times
            for budgets other than shares, so a list or a loader, not a generator.
        budget: as in :func:`twnn_plugin.attach`, for all wormholes; None: what each gate has.

    Returns:
        The model itself.

    Raises:
        AttachError: no wormhole has a learned gate.
        OptionError: there is no budget, or no sample.
    """
    parts = [m for m in model.modules() if isinstance(m, Feedback) and isinstance(m.gate, LearnedGate)]
    if not parts:
        raise AttachError(f"This {type(model).__name__} has no wormhole with a learned gate to calibrate.")
    gates = [part.gate for part in parts if isinstance(part.gate, LearnedGate)]
    if budget is not None:
        for gate in gates:
            gate.budget = budget
        renew_prices(model)
    if any(gate.wanted() is None for gate in gates):
        raise OptionError(
            "There is no budget to calibrate for: give one, such as calibrate(..., budget=0.3)."
        )
    alone = len(gates) == 1 and isinstance(gates[0].budget, float)
    for _ in range(1 if alone else _ROUNDS):
        scores, replays, opened = _measure(model, parts, batches)
        for gate, score, spent, count in zip(gates, scores, replays, opened, strict=True):
            if count:
                gate.effort = gate.effort.new_tensor(spent / count)
            wanted = gate.wanted()
            assert wanted is not None
            gate.threshold = torch.quantile(score, 1 - wanted).to(gate.threshold)
    return model


def renew_prices(model: nn.Module) -> None:
    """After a change of budget: what a replay costs, which nobody needed to know before."""
    blocks = [m for m in model.modules() if isinstance(m, Wormhole)]
    for block in blocks:
        set_prices(block, [block.feedback], lambda block=block: block(block.example))
    inside = {id(block.feedback) for block in blocks}
    parts = [m for m in model.modules() if isinstance(m, Feedback) and id(m) not in inside]
    if any(isinstance(part.gate, LearnedGate) and part.gate.counts_cost() for part in parts):
        backbone = known_backbone(model)
        if backbone is None:
            raise OptionError(
                f"Nothing is known of the inputs of this {type(model).__name__}: give the budget in "
                "multiply-adds when the wormholes are attached."
            )
        set_prices(model, parts, lambda: run(model, backbone.example(model, 1)))


def _measure(
    model: nn.Module, parts: list[Feedback], batches: Iterable[Any]
) -> tuple[list[Tensor], list[int], list[int]]:
    """Scores (N,), rows replayed and open samples of each wormhole."""
    scores: list[list[Tensor]] = [[] for _ in parts]
    replays, opened = [0] * len(parts), [0] * len(parts)
    with evaluating(model):
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            for place, part in enumerate(parts):
                assert isinstance(part.gate, LearnedGate) and part.gate.scores is not None
                assert part.last is not None
                scores[place].append(part.gate.scores.float())
                steps = int(part.last.steps[part.last.open].sum())
                # Rows that are done are evaluated until enough of them are; a group is counted once.
                replays[place] += max(part.last.evaluations, steps)
                opened[place] += int(part.last.open.sum())
    if not scores[0]:
        raise OptionError("calibrate was given no batch.")
    return [torch.cat(rows) for rows in scores], replays, opened
