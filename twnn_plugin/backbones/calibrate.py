"""Setting the thresholds of trained gates from data at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..errors import AttachError, OptionError
from ..gates import FollowsGate, LearnedGate
from ..modes import evaluating
from ..sequence import RecurrentStack, TemporalSpan
from .pricing import renew_prices, unchanged_on_error
from .span import spans

__all__ = ["calibrate"]

Model = TypeVar("Model", bound=nn.Module)
Part = Feedback | TemporalSpan

_ROUNDS = 3  # replays, and the scores of later wormholes, depend on who is open
_MOST = 10  # for wormholes that are solved together, whose samples overlap by nobody knows how much
_NEAR = 0.01


def calibrate(model: Model, batches: Iterable[Any], budget: float | str | None = None) -> Model:
    """Set the thresholds so that the budget holds on the given samples, in eval mode.

    The threshold that was followed in training is that of training samples, in training mode, while the
    weights were still moving. Use validation data, never the test set. Of wormholes that are solved together,
    a sample is replayed where any of them is open: budgets in multiply-adds or rows hold for all of them
    together, whose shares are scaled alike.

    Of wormholes in a :class:`~twnn_plugin.sequence.RecurrentStack` a sample is a decision of the gate: a
    sequence, a time step, or either in each window. The model is called with the inputs alone, without
    lengths.

    Args:
        model: a model with wormholes whose gates learn.
        batches: tensors (B, ...), or tuples or lists that begin with one, on the model's device; iterated
            several times for budgets other than shares and for stacks with windows, so a list or a loader,
            not a generator.
        budget: as in :func:`twnn_plugin.attach`, for all wormholes; None: what each gate has.

    Returns:
        The model itself. After an error, it is as it was.

    Raises:
        AttachError: no wormhole has a learned gate.
        OptionError: there is no budget, or one that steps cannot keep, or no sample, or batches that are not
            of that form, or a generator where batches are needed several times.
    """
    found = [m for m in model.modules() if isinstance(m, (Feedback, TemporalSpan))]
    parts = [part for part in found if isinstance(part.gate, LearnedGate)]
    if not parts:
        raise AttachError(f"This {type(model).__name__} has no wormhole with a learned gate to calibrate.")
    if not isinstance(batches, Iterable):
        raise OptionError(f"calibrate takes an iterable of batches; got a {type(batches).__name__}.")
    gates = [part.gate for part in parts if isinstance(part.gate, LearnedGate)]
    with unchanged_on_error(model), _unchanged_on_error(parts):
        if budget is not None:
            for gate in gates:
                gate.budget = budget
            renew_prices(model)
        for part in parts:
            if isinstance(part, TemporalSpan):
                part.check_gate()
        if any(gate.wanted() is None for gate in gates):
            raise OptionError(
                "There is no budget to calibrate for: give one, such as calibrate(..., budget=0.3)."
            )
        groups = [_Group(members) for members in _groups(model, parts)]
        alone = len(gates) == 1 and isinstance(gates[0].budget, float) and not _windowed(model)
        rounds = 1 if alone else _MOST if any(group.shared for group in groups) else _ROUNDS
        if rounds > 1 and isinstance(batches, Iterator):
            raise OptionError(
                f"calibrate looks at the batches several times for this budget and model, and a "
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

    def __init__(self, members: Sequence[Part]):
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
        decided = [_decisions(part) for part in self.members]
        opened = torch.stack([each for _, each in decided])
        # Rows that are done are evaluated until enough of them are; a group is counted once.
        self.replays += max(sum(record.evaluations for record in known), int(steps.amax(dim=0).sum()))
        self.samples += opened.shape[1]
        self.paying += int(opened.any(dim=0).sum())
        for place in range(len(self.members)):
            self.opened[place] += int(opened[place].sum())
            self.steps[place] += int(steps[place].sum())
        for place in self.gates:
            self.scores[place].append(decided[place][0].float())

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
                gate.put("effort", spent / self.opened[place])
            if not together:
                self.shares[place] = gate.wanted() or 0.0
            elif gate.replays() is not None and self.replays:
                self.shares[place] = min(self.shares[place] / self.excess(), 1.0)
            scores = torch.cat(self.scores[place])
            gate.put("threshold", _quantile(scores, 1 - self.shares[place]))


def _decisions(part: Part) -> tuple[Tensor, Tensor]:
    """(N,) scores, none for a gate without, and (N,) bool, who was open, of a wormhole's last pass."""
    if isinstance(part, TemporalSpan):
        return part.decisions()
    assert part.last is not None
    scores = part.gate.scores if isinstance(part.gate, LearnedGate) else None
    return part.last.gate.new_empty(0) if scores is None else scores, part.last.open


def _quantile(values: Tensor, share: float) -> Tensor:
    """``torch.quantile``, which takes 16 million values at most: too few for the steps of long sequences."""
    ordered, place = values.sort().values, share * (values.numel() - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def _groups(model: nn.Module, parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """These wormholes with all that they are solved with."""
    known: dict[int, tuple[Part, ...]] = {}
    for span in spans(model):
        known.update({id(part): tuple(span.group.parts) for part in span.group.parts})
    for stack in _stacks(model):
        known.update({id(part): group for group in stack.groups for part in group})
    return list(dict.fromkeys(known.get(id(part), (part,)) for part in parts))


def _stacks(model: nn.Module) -> list[RecurrentStack]:
    return [module for module in model.modules() if isinstance(module, RecurrentStack)]


def _windowed(model: nn.Module) -> bool:
    """Whether who is open in one window changes the scores of the next."""
    return any(stack.window is not None and stack.spans for stack in _stacks(model))


@contextmanager
def _unchanged_on_error(parts: Sequence[Part]) -> Iterator[None]:
    """What :func:`unchanged_on_error` is for other wormholes, for those of recurrent stacks."""
    mine = [part for part in parts if isinstance(part, TemporalSpan)]
    kept = [(g, g.budget, g.threshold, g.effort) for p in mine if isinstance(g := p.gate, LearnedGate)]
    records = [part.last for part in mine]
    try:
        yield
    except BaseException:
        for gate, budget, threshold, effort in kept:
            gate.budget, gate.threshold, gate.effort = budget, threshold, effort
        for part, record in zip(mine, records, strict=True):
            part.last = record
        raise


def _inputs(batch: Any) -> Tensor:
    """What the model is given of a batch."""
    given = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(given, Tensor):
        raise OptionError(
            "calibrate takes batches: a tensor, or a tuple or list that begins with one; got a "
            f"{type(batch).__name__}. Rearrange them: calibrate(model, [x['image'] for x in loader])."
        )
    return given


def _measure(model: nn.Module, groups: Sequence[_Group], batches: Iterable[Any]) -> None:
    """Look at all samples once."""
    for group in groups:
        group.clear()
    given = 0
    gates = [gate for group in groups for gate in group.gates.values()]
    with evaluating(model), ExitStack() as stack:
        for gate in gates:
            stack.enter_context(gate.standing())
        for batch in batches:
            model(_inputs(batch))
            given += 1
            for group in groups:
                group.note()
    if not given:
        raise OptionError("calibrate was given no batch.")
    if not all(group.samples for group in groups):
        raise OptionError(f"calibrate was given {given} batches without a single sample in them.")
