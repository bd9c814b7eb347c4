"""Setting the thresholds of trained gates from data at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..errors import AttachError, OptionError
from ..gates import FollowsGate, LearnedGate
from ..modes import evaluating
from .pricing import renew_prices, unchanged_on_error
from .span import spans

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)

_ROUNDS = 3  # replays, and the scores of later wormholes, depend on who is open
_MOST = 10  # for wormholes that are solved together, whose samples overlap by nobody knows how much
_NEAR = 0.01


def calibrate(model: Model, batches: Iterable[Any], budget: float | str | None = None) -> Model:
    """Set the thresholds so that the budget holds on the given samples, in eval mode.

    The threshold that was followed in training is that of training samples, in training mode, while the
    weights were still moving. Use validation data, never the test set. Of wormholes that are solved together,
    a sample is replayed where any of them is open: budgets in multiply-adds or rows hold for all of them
    together, whose shares are scaled alike.

    Args:
        model: a model with wormholes whose gates learn.
        batches: inputs, or tuples that begin with inputs, on the model's device; iterated several times
            for budgets other than shares, so a list or a loader, not a generator.
        budget: as in :func:`twnn_plugin.attach`, for all wormholes; None: what each gate has.

    Returns:
        The model itself. After an error, it is as it was.

    Raises:
        AttachError: no wormhole has a learned gate.
        OptionError: there is no budget, or no sample, or a generator where batches are needed several times.
    """
    parts = [m for m in model.modules() if isinstance(m, Feedback) and isinstance(m.gate, LearnedGate)]
    if not parts:
        raise AttachError(f"This {type(model).__name__} has no wormhole with a learned gate to calibrate.")
    gates = [part.gate for part in parts if isinstance(part.gate, LearnedGate)]
    with unchanged_on_error(model):
        if budget is not None:
            for gate in gates:
                gate.budget = budget
            renew_prices(model)
        if any(gate.wanted() is None for gate in gates):
            raise OptionError(
                "There is no budget to calibrate for: give one, such as calibrate(..., budget=0.3)."
            )
        groups = [_Group(members) for members in _groups(model, parts)]
        alone = len(gates) == 1 and isinstance(gates[0].budget, float)
        rounds = 1 if alone else _MOST if any(group.shared for group in groups) else _ROUNDS
        if rounds > 1 and isinstance(batches, Iterator):
            raise OptionError(
                f"calibrate looks at the batches several times for this budget, and a "
                f"{type(batches).__name__} can be gone through only once: give a list of batches or a loader."
            )
        for done in range(rounds):
            _measure(model, groups, batches)
            if done >= _ROUNDS and all(group.meets() for group in groups):
                break
            for group in groups:
                group.adjust(first=done == 0)
    return model


class _Group:
    """Wormholes that are solved together, most often a single one, and what was measured of them.

    Args:
        members: all of them, in the order of the group.
    """

    def __init__(self, members: Sequence[Feedback]):
        self.members = tuple(members)
        self.gates = {place: p.gate for place, p in enumerate(members) if isinstance(p.gate, LearnedGate)}
        self.shares: dict[int, float] = {}
        allowed = [gate.replays() for gate in self.gates.values()]
        follow = all(p.policy is None or isinstance(p.policy, FollowsGate) for p in members)
        self.shared = len(self.members) > 1 and follow and any(known is not None for known in allowed)
        """Whether a budget in replays holds for several gates together."""
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.samples, self.replays, self.paying = 0, 0, 0
        self.opened, self.steps = [0] * len(self.members), [0] * len(self.members)
        self.scores: dict[int, list[Tensor]] = {place: [] for place in self.gates}

    def note(self) -> None:
        """Take in the records of a pass."""
        records = [part.last for part in self.members]
        known = [record for record in records if record is not None]
        assert len(known) == len(records)
        steps = torch.stack([record.steps * record.open for record in known])
        # Rows that are done are evaluated until enough of them are; a group is counted once.
        self.replays += max(sum(record.evaluations for record in known), int(steps.amax(dim=0).sum()))
        self.samples += steps.shape[1]
        self.paying += int(torch.stack([record.open for record in known]).any(dim=0).sum())
        for place, record in enumerate(known):
            self.opened[place] += int(record.open.sum())
            self.steps[place] += int(steps[place].sum())
        for place, gate in self.gates.items():
            assert gate.scores is not None
            self.scores[place].append(gate.scores.float())

    def excess(self) -> float:
        """Replays a sample relative to those that the budgets allow; the strictest budget counts."""
        allowed = [gate.replays() for gate in self.gates.values()]
        return self.replays / self.samples / min(known for known in allowed if known is not None)

    def meets(self) -> bool:
        """Whether a budget that holds for several gates together is met, or leaves nothing more to open."""
        if not self.shared:
            return True
        counted = [self.shares[place] for place, gate in self.gates.items() if gate.replays() is not None]
        excess = self.excess()
        grain = excess / self.paying if self.paying else 0.0  # of a sample: no threshold is nearer than half
        return abs(excess - 1) <= max(_NEAR, grain / 2) or (excess < 1 and min(counted) == 1)

    def adjust(self, first: bool) -> None:
        """Set the thresholds by what was measured."""
        together = self.shared and not first
        for place, gate in self.gates.items():
            # Between wormholes of a group, who pays for a sample that several of them open is not known.
            spent = self.replays if together or len(self.members) == 1 else self.steps[place]
            if self.opened[place]:
                gate.effort = gate.effort.new_tensor(spent / self.opened[place])
            if not together:
                self.shares[place] = gate.wanted() or 0.0
            elif gate.replays() is not None and self.replays:
                self.shares[place] = min(self.shares[place] / self.excess(), 1.0)
            scores = torch.cat(self.scores[place])
            gate.threshold = torch.quantile(scores, 1 - self.shares[place]).to(gate.threshold)


def _groups(model: nn.Module, parts: Sequence[Feedback]) -> list[tuple[Feedback, ...]]:
    """These wormholes with all that they are solved with."""
    known = {id(part): span.group.parts for span in spans(model) for part in span.group.parts}
    return list(dict.fromkeys(known.get(id(part), (part,)) for part in parts))


def _measure(model: nn.Module, groups: Sequence[_Group], batches: Iterable[Any]) -> None:
    """Look at all samples once."""
    for group in groups:
        group.clear()
    given = 0
    with evaluating(model):
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            given += 1
            for group in groups:
                group.note()
    if not given:
        raise OptionError("calibrate was given no batch.")
    if not all(group.samples for group in groups):
        raise OptionError(f"calibrate was given {given} batches without a single sample in them.")
