"""Wormholes that are solved by running the model's own forward again; and the proof that they can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import Feedback
from ..blocks.open_loop import OpenLoop
from ..errors import AttachError
from .checks import check_reach, check_rows, perturbed, same
from .plan import Refusal
from .rerun import Own, Rerun
from .span import AttachedGroup
from .survey import Survey, run
from .wiring import Arguments

__all__ = ["Entrance", "RerunGroup", "check_rerun"]


def check_rerun(model: nn.Module, seen: Survey, program: Rerun) -> None:
    """Refuse a span that is not what the model computes when its forward is run again.

    Raises:
        Refusal: it reacts to a change at its targets otherwise than the model does, mixes samples, or could
            change nothing.
    """
    found = program.plan
    for call in {*(end.target for end in found.ends), *(out[0] for out in found.outs), found.last}:
        if sum(other.module is program.called[call] for other in seen.flow.calls) > 1:
            raise Refusal(
                f"{program.paths[call]!r}, where it begins or ends, is called more than once in a pass."
            )
    given = _given(model, program.method, seen.examples[0])
    own = program.own(program.method)

    def go() -> Any:
        return own(*given[0], **given[1])

    targets = [(end.target - found.first, e) for end, e in zip(found.ends, found.entries, strict=True)]
    sources = [(source - found.first, leaf) for source, leaf in found.outs]
    check_reach(go, program.called[found.first :], targets, sources)
    changed = perturbed(go, program.called[found.first :], targets, sources, whole=True)
    noted = program.record(own, given, lambda entry, module, given: None, lambda outs: False)
    rows = program.constants(noted.seen)
    states, _ = program.replay(changed.entry, changed.signals, noted.seen, rows)
    if not all(same(a, b) for a, b in zip(states, changed.states, strict=True)):
        raise Refusal("the model answers a change of its input otherwise when its forward is run again.")
    settled = program.finish(own, noted, changed.signals, changed.states, nullcontext())
    closed = program.finish(own, noted, None, noted.outs, nullcontext())
    if not (same(settled, changed.result) and same(closed, go())):
        raise Refusal("the model's output is another one when its forward is run again.")
    check_rows(lambda *g: program.replay(g[0], g[1], noted.seen, g[2])[0], changed, rows, seen.flow.batch)


def _given(model: nn.Module, method: str, example: Any) -> Arguments:
    """What a method of the model is given in a pass."""
    found: list[Arguments] = []
    before, own = vars(model).get(method), getattr(model, method)

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append((args, kwargs))
        return own(*args, **kwargs)

    setattr(model, method, note)
    try:
        run(model, example)
    finally:
        if before is None:
            delattr(model, method)
        else:
            setattr(model, method, before)
    return found[0]


class RerunGroup(AttachedGroup):
    """A group that is solved by running the model's own forward again.

    The method that is run again is stood in for on this instance of the model, and so is
    ``forward_intermediates``, where every activation that is gathered is then a settled one.

    Args:
        parts: the wormholes.
        program: their part of the forward.
    """

    mode = "rerun"
    program: Rerun

    def __init__(self, parts: Sequence[Feedback], program: Rerun):
        super().__init__(parts, program)
        model = program.model[0]
        for method in (program.method, "forward_intermediates"):
            if callable(getattr(model, method, None)):
                setattr(model, method, Entrance(self, method))

    def reached(self) -> Sequence[nn.Module]:
        return (self.program.model[0],)

    def busy(self) -> bool:
        # While calls of the modules are played, other threads wait, and would for ever if this one halted.
        return self.unfinished() or self.program.turns.taken()

    def inside(self) -> list[nn.Module]:
        found = self.program.plan
        return list(dict.fromkeys(self.program.called[found.first : found.last]))

    def run(self, own: Own, given: Arguments) -> Any:
        """What a method of the model returns, with the group settled."""
        program, now = self.program, self.passes.now
        if now.replaying or self.unfinished():
            return own(*given[0], **given[1])
        self.check_exporting()

        def begin(entry: Tensor, module: nn.Module, given: Arguments) -> None:
            now.open_loop = OpenLoop(self.one_map, entry, self.training)
            if isinstance(module, _BatchNorm):
                self.one_map.hear_first(module, *given)

        def rests(outs: Sequence[Tensor]) -> bool:
            if now.open_loop is None or not self.rests(now.open_loop, outs):
                return False
            now.open_loop = None  # what follows lies behind the span
            return True

        try:
            noted = program.record(own, given, begin, rests)
        finally:
            watched, now.open_loop = now.open_loop, None
        if noted.rests:
            return noted.result
        if watched is None or noted.calls <= program.plan.last:
            if watched is None:
                return noted.result
            raise AttachError(
                f"The pass ended inside of span {self.name!r}, so that nothing in it is settled. Let it go "
                "on to the end of the span (stop_early=False)."
            )
        constants = program.constants(noted.seen)
        seen = noted.seen[: program.plan.first + 1]

        def evaluate(entry: Tensor, signals: Sequence[Tensor | None], *rows: Tensor) -> Any:
            with self.quiet():
                return program.replay(entry, signals, seen, rows)

        silence = (None,) * len(self.parts)
        entry = watched.entry
        outs, frozen = watched.finish(tuple(noted.outs), lambda: evaluate(entry, silence, *constants)[0])
        values, signals = self.solve(noted.entries, outs, evaluate, constants, frozen, entry)
        self.keep(seen)
        if signals is None and self.training:
            signals = silence  # drawn and counted once more, as the recorded pass was
        held = nullcontext() if frozen is None else frozen.replay(None)
        return program.finish(own, noted, signals, values, held)


class Entrance:
    """Stands for a method of the model; an object, because closures cannot be pickled."""

    def __init__(self, group: RerunGroup, method: str):
        self.group, self.method = group, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A compiler cannot follow a forward that is broken off and run again: it leaves its graph for it.
        return (_outside if torch.compiler.is_compiling() else Entrance.run)(self, (args, kwargs))

    def run(self, given: Arguments) -> Any:
        """What the method returns, with the group settled."""
        return self.group.run(self.group.program.own(self.method), given)


_outside: Callable[..., Any] = torch.compiler.disable(Entrance.run)  # type: ignore[call-arg]
