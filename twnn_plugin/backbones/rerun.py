"""The fallback for what cannot be replayed call by call: the model's own forward, run again.

Some models compute between their modules (twins, convit, visformer), or use what lies inside of a span
elsewhere (coat, efficientvim). Their map is then the model's own code: everything before the span answers
from memory, the messages are added at their targets, and the run is broken off at the span's end. Once the
equation is solved, the forward is run a last time, from the solution to the model's output, so that all that
depends on the span sees it settled. Right, and slower than a replay by what the model does between its
modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import AttachError
from ..trees import leaves, rebuild
from .flow import Place, leaf_at, rows_per_sample, with_leaf
from .plan import Ends, Plan, Refusal, loose
from .survey import Survey, run_for_real
from .wiring import Arguments, Program, Turns, split

__all__ = ["Own", "Recorded", "Rerun", "rerun"]

Own = Callable[..., Any]
"""The method that is run again, bound."""

Handler = Callable[[int, Own, Any, Any], Any]
"""``handler(call, forward, args, kwargs) -> output``: what a call of a module does in a run."""


class _Stop(Exception):
    """Ends a run at the end of the span."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


@dataclass
class Recorded:
    """The open-loop pass, up to the end of the span.

    Attributes:
        seen: what the method was given; then what each call returned.
        entries: for each wormhole, the input of its target.
        outs: for each, the output of its source.
        result: what the method returned, if it was not broken off at the end of the span.
        calls: how many calls were made, up to there.
        rests: whether nothing is to be settled.
    """

    seen: list[Any]
    entries: list[Any]
    outs: list[Any]
    result: Any = None
    calls: int = 0
    rests: bool = False


@dataclass(frozen=True)
class Rerun(Program):
    """A group of spans as a part of the model's own forward.

    Attributes:
        model: the model, in a tuple so that it does not become a child of the holder.
        method: the method that is run again.
        paths: of the calls, from the first of the pass to the end of the span.
        called: their modules.
        plan: the span.
        rows: for the calls before the span, the rows per sample of each leaf of the output.
        copied: outputs that are changed in place later on, so that a copy is kept.
        turns: whose turn it is to stand in for the model's modules.
    """

    model: tuple[nn.Module]
    method: str
    paths: tuple[str, ...]
    called: tuple[nn.Module, ...]
    plan: Plan
    rows: tuple[tuple[int, ...], ...]
    copied: frozenset[Place] = field(default_factory=frozenset)
    turns: Turns = field(default_factory=Turns, compare=False)

    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(self.called[self.plan.first :]))

    def constants(self, seen: Sequence[Any]) -> tuple[Tensor, ...]:
        found: list[Tensor] = [leaf for leaf in leaves(seen[0]) if _has_rows(leaf, seen[0])]
        for output, rows in zip(seen[1:], self.rows, strict=False):
            found += [split(leaf, n) for leaf, n in zip(leaves(output), rows, strict=True) if n]
        return tuple(found)

    def replay(
        self,
        entry: Tensor,
        signals: Sequence[Tensor | None],
        seen: Sequence[Arguments],
        rows: Sequence[Tensor] = (),
    ) -> tuple[tuple[Tensor, ...], Any]:
        fed = iter(rows)
        given = rebuild(seen[0], lambda leaf: next(fed) if _has_rows(leaf, seen[0]) else leaf)
        memory = [self._gathered(call, seen[call + 1], fed) for call in range(self.plan.first)]
        states: list[Any] = [None] * len(self.plan.ends)

        def handler(call: int, forward: Own, args: Any, kwargs: Any) -> Any:
            if call < self.plan.first:
                return self._remembered(call, memory[call])
            output = self._call(call, forward, args, kwargs, signals, entry)
            for wormhole, (source, leaf) in enumerate(self.plan.outs):
                if source == call:
                    state = leaf_at(output, leaf)
                    states[wormhole] = state.clone() if (call, leaf) in self.copied else state
            if call == self.plan.last:
                raise _Stop(output)
            return output

        try:
            with self._played(handler):
                self.own(self.method)(*given[0], **given[1])
        except _Stop as stop:
            return tuple(states), stop.output
        raise AttachError("The model's forward, run again, never came to the end of the span.")

    def own(self, method: str) -> Own:
        """A method of the model's class, bound."""
        return getattr(type(self.model[0]), method).__get__(self.model[0])

    def record(
        self,
        own: Own,
        given: Arguments,
        begin: Callable[[Tensor, nn.Module, Arguments], None],
        rests: Callable[[Sequence[Tensor]], bool],
    ) -> Recorded:
        """Make the open-loop pass up to the end of the span, or to its own end if nothing is to be settled.

        Args:
            own: the method.
            given: its arguments.
            begin: told the group's entry when the pass gets there, and which module is called with what.
            rests: of the outputs of the sources: whether these are the settled ones.
        """
        count = len(self.plan.ends)
        noted = Recorded([given], [None] * count, [None] * count)

        def handler(call: int, forward: Own, args: Any, kwargs: Any) -> Any:
            if call > self.plan.last:
                return forward(*args, **kwargs)
            noted.calls = call + 1
            for wormhole, end in enumerate(self.plan.ends):
                if end.target == call:
                    value = leaf_at((args, kwargs), self.plan.entries[wormhole])
                    first = call == self.plan.first
                    noted.entries[wormhole] = value.clone() if first and self.plan.copies_entry else value
            if call == self.plan.first:
                entry = next(
                    e for e, end in zip(noted.entries, self.plan.ends, strict=True) if end.target == call
                )
                begin(entry, self.called[call], (args, kwargs))
            output = forward(*args, **kwargs)
            noted.seen.append(self._remembered(call, output))
            for wormhole, (source, leaf) in enumerate(self.plan.outs):
                if source == call:
                    noted.outs[wormhole] = leaf_at(noted.seen[-1], leaf)
            if call == self.plan.last:
                noted.rests = rests(noted.outs)
                if not noted.rests:
                    raise _Stop(output)
            return output

        try:
            with self._played(handler):
                noted.result = own(*given[0], **given[1])
        except _Stop:
            pass
        return noted

    def finish(
        self,
        own: Own,
        noted: Recorded,
        signals: Sequence[Tensor | None] | None,
        values: Sequence[Tensor],
        held: AbstractContextManager[Any],
    ) -> Any:
        """Run the method to its end, with the span settled.

        Args:
            own: the method.
            noted: the open-loop pass.
            signals: what the messages add at the solution; None: nothing was settled, so that the calls of
                the span answer from memory, too.
            values: the settled outputs.
            held: holds what stands still, until the end of the span.
        """
        stack = ExitStack()

        def handler(call: int, forward: Own, args: Any, kwargs: Any) -> Any:
            if call > self.plan.last:
                return forward(*args, **kwargs)
            if call < self.plan.first or signals is None:
                output = self._remembered(call, noted.seen[call + 1])
            else:
                output = self._call(call, forward, args, kwargs, signals, None)
            for wormhole, (source, leaf) in enumerate(self.plan.outs):
                if source == call:
                    output = with_leaf(output, leaf, values[wormhole])
                    if (call, leaf) in self.copied:
                        output = rebuild(output, lambda v: v.clone() if isinstance(v, Tensor) else v)
            if call == self.plan.last:
                stack.close()
            return output

        with stack, self._played(handler):
            stack.enter_context(held)
            return own(*noted.seen[0][0], **noted.seen[0][1])

    def _call(
        self,
        call: int,
        forward: Own,
        args: Any,
        kwargs: Any,
        signals: Sequence[Tensor | None],
        entry: Tensor | None,
    ) -> Any:
        """One call of the span, with what is added to its first input."""
        if call not in {end.target for end in self.plan.ends}:
            return forward(*args, **kwargs)
        place = self.plan.entry_of(call)
        value = leaf_at((args, kwargs), place)
        if call == self.plan.first:
            value = value if entry is None else entry
            value = value.clone() if self.plan.copies_entry else value
        for signal, end in zip(signals, self.plan.ends, strict=True):
            if end.target == call and signal is not None:
                value = value + signal
        args, kwargs = with_leaf((args, kwargs), place, value)
        return forward(*args, **kwargs)

    def _remembered(self, call: int, output: Any) -> Any:
        places = iter(range(sum(1 for _ in leaves(output))))
        return rebuild(output, lambda leaf: leaf.clone() if (call, next(places)) in self.copied else leaf)

    def _gathered(self, call: int, output: Any, fed: Iterator[Tensor]) -> Any:
        counts = iter(self.rows[call])

        def pick(leaf: Any) -> Any:
            count = next(counts)
            if not count:
                return leaf
            return next(fed).flatten(0, 1) if count > 1 else next(fed)

        return rebuild(output, pick)

    @contextmanager
    def _played(self, handler: Handler) -> Iterator[None]:
        """Within this, calls of the modules go to ``handler``, in their order."""
        turn = _Turn(self, handler, threading.get_ident())
        modules = list(dict.fromkeys(self.called))
        with self.turns.mine():
            before = [vars(module).get("forward") for module in modules]
            try:
                for module, own in zip(modules, before, strict=True):
                    setattr(module, "forward", _Stand(module, own, turn))  # noqa: B010 - for this instance
                yield
            finally:
                for module, own in zip(modules, before, strict=True):
                    if own is None:
                        delattr(module, "forward")
                    else:
                        setattr(module, "forward", own)  # noqa: B010


@dataclass
class _Turn:
    """Which call comes next in a run."""

    program: Rerun
    handler: Handler
    thread: int
    call: int = 0
    inside: bool = False


@dataclass
class _Stand:
    """Stands for a module's ``forward`` in a run."""

    module: nn.Module
    before: Any
    turn: _Turn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        turn, forward = self.turn, self.before or type(self.module).forward.__get__(self.module)
        if turn.inside or turn.thread != threading.get_ident():
            return forward(*args, **kwargs)
        call, called = turn.call, turn.program.called
        if call < len(called) and called[call] is not self.module:
            raise AttachError(
                f"The pass calls a {type(self.module).__name__} where it called {turn.program.paths[call]!r} "
                "when the wormhole was attached. It goes another way through the model; attach for this way."
            )
        turn.call, turn.inside = call + 1, True
        try:
            return turn.handler(call, forward, args, kwargs)
        finally:
            turn.inside = False


def _has_rows(leaf: Any, given: Any) -> bool:
    """Whether a leaf of the method's arguments has a row for each sample, as the first tensor has."""
    first = next((v for v in leaves(given) if isinstance(v, Tensor)), None)
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and first is not None and len(leaf) == len(first)


def rerun(model: nn.Module, seen: Survey, ends: Sequence[Ends]) -> Rerun:
    """A group of spans as a part of the model's forward.

    Raises:
        Refusal: the model calls other modules for other batches, or something before the span mixes samples.
    """
    found = loose(seen.flow, seen.other, ends)
    calls = seen.flow.calls[: found.last + 1]
    rows = []
    for call, twin in zip(calls[: found.first], seen.other.calls, strict=False):
        pairs = zip(call.outputs, twin.outputs, strict=True)
        try:
            rows.append(tuple(_rows(a, b, seen.flow.batch, seen.other.batch) for a, b in pairs))
        except ValueError as error:
            raise Refusal(
                f"{call.path!r} returns a tensor that cannot be split by samples: {error}"
            ) from error
    return Rerun(
        (model,),
        _method(model, seen, found),
        tuple(call.path for call in calls),
        tuple(call.module for call in calls),
        found,
        tuple(rows),
        frozenset(place for place in seen.flow.changed if place[0] <= found.last),
    )


def _rows(shape: Any, same: Any, batch: int, other: int) -> int:
    return 0 if shape is None or same is None else rows_per_sample(shape, same, batch, other)


def _method(model: nn.Module, seen: Survey, found: Plan) -> str:
    """The innermost method that the whole pass up to the span's end lies in."""
    if not callable(getattr(model, "forward_features", None)):
        return "forward"
    probe = _Probe(model)
    with ExitStack() as stack:
        for module in dict.fromkeys(call.module for call in seen.flow.calls):
            stack.callback(module.register_forward_hook(probe.count).remove)
        stack.callback(lambda: delattr(model, "forward_features"))
        model.forward_features = probe  # pyright: ignore[reportArgumentType]
        run_for_real(model, seen.examples[0])
    inside = probe.range is not None and probe.range[0] == 0 and probe.range[1] > found.last
    return "forward_features" if inside else "forward"


class _Probe:
    """Notes how many calls are made before and inside of ``forward_features``."""

    def __init__(self, model: nn.Module):
        self.own = model.forward_features
        self.calls = 0
        self.range: tuple[int, int] | None = None

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.calls
        result = self.own(*args, **kwargs)  # type: ignore[operator]
        self.range = before, self.calls
        return result
