"""What has to be replayed for a group of wormholes, or why it cannot be: read off the flow of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .flow import Call, Flow, Place, Use, rows_per_sample

__all__ = ["Ends", "Plan", "Refusal", "loose", "plan"]


@dataclass(frozen=True)
class Ends:
    """A wormhole as calls: the message enters ``target``, the state leaves ``source``.

    Of their inputs and outputs it is the first tensor with one row for each sample that the model goes on
    with.
    """

    target: int
    source: int


class Refusal(Exception):
    """Why calls cannot be replayed.

    Attributes:
        leaks: whether the span itself is in order, but its inside is used elsewhere.
    """

    def __init__(self, reason: str, leaks: bool = False):
        super().__init__(reason)
        self.leaks = leaks


@dataclass(frozen=True)
class Plan:
    """What is replayed.

    Attributes:
        ends: the wormholes of the group.
        calls: the calls to be made, in order: those that the first target reaches and a source needs.
        entries: for each wormhole, which leaf of its target's arguments the message is added to.
        outs: for each wormhole, the place of its state.
        copies_entry: whether the first call changes its input in place, so that it gets a copy.
        copies_outs: for each wormhole, whether its state is changed in place later on.
        rest: leaves of the last call's output, besides its state, that the model goes on with.
    """

    ends: tuple[Ends, ...]
    calls: tuple[int, ...]
    entries: tuple[int, ...]
    outs: tuple[Place, ...]
    copies_entry: bool
    copies_outs: tuple[bool, ...]
    rest: tuple[int, ...]

    @property
    def first(self) -> int:
        """The call where the group begins."""
        return self.calls[0]

    def entry_of(self, call: int) -> int:
        """Which leaf of a call's arguments messages are added to, if it is a target; else 0."""
        return next((e for e, end in zip(self.entries, self.ends, strict=True) if end.target == call), 0)

    @property
    def last(self) -> int:
        """The call whose output goes back to the model, settled."""
        return self.calls[-1]


def plan(flow: Flow, other: Flow, ends: Sequence[Ends]) -> Plan:
    """The calls to replay for a group of wormholes that share calls.

    Args:
        flow: a pass of the model.
        other: a pass with another batch size.
        ends: the wormholes.

    Raises:
        Refusal: they cannot be replayed one after another.
    """
    if not flow.same_calls(other):
        raise Refusal("the model calls other modules for another batch size.")
    targets = {end.target for end in ends}
    first, last = min(targets), max(end.source for end in ends)
    outs = tuple(_state(flow, other, end.source) for end in ends)
    entries = tuple(_entry(flow, other, end.target) for end in ends)
    reached = _reached(flow, targets, first, last)
    needed = _needed(flow, {end.source for end in ends}, reached)
    _check_reached(flow, ends, reached)
    live = tuple(sorted(needed | (targets & reached)))
    open_ends = {(end.target, entry) for end, entry in zip(ends, entries, strict=True)}
    _check_wires(flow, live, reached, open_ends)
    _check_leaks(flow, reached, last)
    _check_once(flow, live)
    changed = tuple(out in flow.changed for out in outs)
    used = {place for use in _uses_after(flow, last) for place in use.places() if place[0] == last}
    rest = tuple(sorted(place[1] for place in used - set(outs)))
    return Plan(tuple(ends), live, entries, outs, _overwritten(flow, ends, entries), changed, rest)


def loose(flow: Flow, other: Flow, ends: Sequence[Ends]) -> Plan:
    """All calls of a group, whatever the model computes between them: for running its forward again.

    Raises:
        Refusal: a target takes no tensor, a source returns none or does not depend on the target.
    """
    if not flow.same_calls(other):
        raise Refusal("the model calls other modules for another batch size.")
    first, last = min(end.target for end in ends), max(end.source for end in ends)
    outs = tuple(_state(flow, other, end.source) for end in ends)
    entries = tuple(_entry(flow, other, end.target) for end in ends)
    reached = _reached(flow, {end.target for end in ends}, first, last)
    _check_reached(flow, ends, reached)
    changed = tuple(out in flow.changed for out in outs)
    calls = tuple(range(first, last + 1))
    return Plan(tuple(ends), calls, entries, outs, _overwritten(flow, ends, entries), changed, ())


def _overwritten(flow: Flow, ends: Sequence[Ends], entries: Sequence[int]) -> bool:
    """Whether the first call changes the group's input in place."""
    first = min(zip(ends, entries, strict=True), key=lambda pair: pair[0].target)
    return first[1] in flow.calls[first[0].target].in_place


def _check_reached(flow: Flow, ends: Sequence[Ends], reached: set[int]) -> None:
    missing = sorted({end.source for end in ends} - reached)
    if missing:
        first = min(end.target for end in ends)
        raise Refusal(
            f"{flow.calls[missing[0]].path!r} does not depend on the input of {flow.calls[first].path!r}."
        )


def _is_sample(shape: Any, same: Any, flow: Flow, other: Flow) -> bool:
    """Whether a tensor has one row for each sample."""
    try:
        return rows_per_sample(shape, same, flow.batch, other.batch) == 1
    except ValueError:
        return False


def _entry(flow: Flow, other: Flow, target: int) -> int:
    """The argument of a call that a message is added to."""
    call, twin = flow.calls[target], other.calls[target]
    for position, (use, same) in enumerate(zip(call.inputs, twin.inputs, strict=True)):
        if isinstance(use, Use) and isinstance(same, Use) and _is_sample(use.shape, same.shape, flow, other):
            return position
    raise Refusal(f"{call.path!r}, where it begins, is given no tensor with one row for each sample.")


def _state(flow: Flow, other: Flow, source: int) -> Place:
    """The output of a call that the state is; of several the first that the model goes on with."""
    call, twin = flow.calls[source], other.calls[source]
    outputs = enumerate(zip(call.real, call.outputs, twin.outputs, strict=True))
    real = [(source, i) for i, (is_real, a, b) in outputs if is_real and _is_sample(a, b, flow, other)]
    if not real:
        raise Refusal(
            f"{call.path!r}, where it ends, returns no tensor of real numbers with one row for each sample."
        )
    used = {place for use in _uses_after(flow, source) for place in use.places()}
    return next((place for place in real if place in used), real[0])


def _uses(call: Call) -> Iterator[Use]:
    return (leaf for leaf in call.inputs if isinstance(leaf, Use))


def _uses_after(flow: Flow, index: int) -> list[Use]:
    return [use for call in flow.calls[index + 1 :] for use in _uses(call)] + flow.result


def _reached(flow: Flow, targets: set[int], first: int, last: int) -> set[int]:
    reached = set(targets)
    for index in range(first, last + 1):
        if any(use.calls() & {r for r in reached if r < index} for use in _uses(flow.calls[index])):
            reached.add(index)
    return reached


def _needed(flow: Flow, sources: set[int], reached: set[int]) -> set[int]:
    needed, waiting = set(), [source for source in sources if source in reached]
    while waiting:
        index = waiting.pop()
        if index in needed:
            continue
        needed.add(index)
        for use in _uses(flow.calls[index]):
            waiting += [i for i in use.calls() if i in reached and i < index]
    return needed


def _check_wires(flow: Flow, live: Sequence[int], reached: set[int], entries: set[Place]) -> None:
    first = live[0]
    for index in live:
        call = flow.calls[index]
        for position, use in enumerate(call.inputs):
            entered = (index, position) in entries
            if not isinstance(use, Use) or (index == first and entered):
                continue
            wired = use.direct is not None and use.direct[0] in reached
            behind = sorted(i for i in use.calls() if i in reached and i < index)
            if behind and not wired:
                raise Refusal(
                    f"the model computes something between {flow.calls[behind[-1]].path!r} and "
                    f"{call.path!r}, outside of its modules, that a replay of the modules does not follow."
                )
            if position in call.in_place and not wired and not entered:
                raise Refusal(f"{call.path!r} changes a tensor from outside in place.")


def _check_leaks(flow: Flow, reached: set[int], last: int) -> None:
    consumers: Iterable[tuple[str, Use]] = [
        *((repr(call.path), use) for call in flow.calls[last + 1 :] for use in _uses(call)),
        *(("the model's output", use) for use in flow.result),
    ]
    for name, use in consumers:
        inner = sorted(call for call, _ in use.places() if call in reached and call != last)
        if inner:
            raise Refusal(
                f"{name} uses activations from inside it, of {flow.calls[inner[0]].path!r}, which would stay "
                "those of the open-loop pass.",
                leaks=True,
            )


def _check_once(flow: Flow, live: Sequence[int]) -> None:
    inside = {id(flow.calls[index].module): index for index in live}
    for index, call in enumerate(flow.calls):
        if inside.get(id(call.module), index) != index:
            raise Refusal(f"{call.path!r} is called more than once in a pass.")
