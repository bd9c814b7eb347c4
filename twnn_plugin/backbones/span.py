"""Wormholes in a model at hand: hooks on the modules of their spans, replay instead of surgery."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import transforms
from ..adjoints.held import Reaching
from ..blocks import Feedback, SpanRecord
from ..blocks.companion import PerThread
from ..blocks.count import group_multiply_adds
from ..blocks.one_map import Frozen, OneMap
from ..blocks.open_loop import OpenLoop
from ..blocks.settle import at_rest, settle, settle_and_send
from ..errors import AttachError
from ..gates.constant import NeverGate
from ..trees import rebuild
from .flow import leaf_at
from .wiring import Arguments, Placed, Program, Turns, Wiring, snapshot, versions

__all__ = ["AttachedGroup", "AttachedSpan", "ReplayedGroup", "asleep", "settling", "spans"]

Settler = Callable[..., tuple[Tensor, ...]]
"""What takes the place of :func:`twnn_plugin.blocks.settle.settle`."""

Evaluate = Callable[..., tuple[tuple[Tensor, ...], Any]]
"""``evaluate(entry, signals, *constants) -> (states, what the last call returned)``."""


_LINK: Arguments = ((None,), {})
"""The arguments of a call that is given one tensor, which another call of the group has returned."""


class _Pass:
    """How far a pass has come in a group.

    Attributes:
        open_loop: what watches it; None: it is not inside of the group.
        replaying: whether calls of the modules are nothing to the group.
        how: what settles in place of the ordinary solve; None: nothing.
        begun: whether the model's own pass has begun and not come to the group yet.
        by_hand: whether the group was entered without one.
        seen: what the calls were given so far.
        caught: the outputs of inner sources.
        left: what the last call gave back, and its versions, where somebody looks after that.
    """

    __slots__ = ("begun", "by_hand", "caught", "how", "left", "open_loop", "replaying", "seen")

    def __init__(self, parts: int):
        self.open_loop: OpenLoop | None = None
        self.replaying = self.begun = self.by_hand = False
        self.how: Settler | None = None
        self.seen: list[Arguments] = []
        self.caught: list[Any] = [None] * parts
        self.left: list[tuple[Tensor, int]] | None = None


class _Passes(PerThread):
    """The pass of each thread: several may use a model in eval mode, and streams halt in the middle."""

    def __init__(self, parts: int):
        self.parts = parts
        self.now = _Pass(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.parts,)


class AttachedGroup(Reaching):
    """Wormholes whose spans overlap, solved as one equation; most often a single one.

    A group is no module: it calls the model's own modules, which stay where they are.

    Args:
        parts: the wormholes.
        program: their spans as a function.
    """

    mode: str
    """``"replay"`` or ``"rerun"``: how the equation's map is evaluated."""

    def __init__(self, parts: Sequence[Feedback], program: Program):
        self.parts = tuple(parts)
        self.program = program
        self.one_map = OneMap(program.modules())
        self.passes = _Passes(len(self.parts))
        self.turns = Turns()  # of threads that stand in for the modules
        self.kept: Sequence[Arguments] = ()  # the last solve's constants, for counting
        self.look: Callable[[], None] | None = None  # raises if a module of the spans was replaced
        self.stale: Callable[[], None] | None = None  # raises if hooks have come that nobody looked at
        for part in self.parts:
            part.mode = self.mode

    @property
    def name(self) -> str:
        """The names of the spans."""
        return ", ".join(part.span for part in self.parts)

    @property
    def training(self) -> bool:
        """Whether the wormholes are in training mode."""
        return self.parts[0].training

    @property
    def open_loop(self) -> OpenLoop | None:
        """What watches this thread's pass; None: it is not inside of the group."""
        return self.passes.now.open_loop

    @property
    def replaying(self) -> bool:
        """Whether this thread's calls of the modules are nothing to the group."""
        return self.passes.now.replaying

    def busy(self) -> bool:
        """Whether this thread's pass may not be halted for others: it is inside of the group."""
        return self.unfinished()

    def unfinished(self) -> bool:
        """Whether a pass of this thread has entered the group and not left it."""
        return self.passes.now.open_loop is not None

    def rests(self, watched: OpenLoop, outs: Sequence[Tensor]) -> bool:
        """Whether the open-loop outputs are the settled ones, as far as a glance tells.

        Args:
            watched: the pass.
            outs: (B, ...) the open-loop outputs of the sources.
        """
        if self.passes.now.how is not None:
            return False
        if torch.jit.is_tracing() and not self._never():  # also where the example opens no gate: others will
            self.refuse_graph("torch.jit.trace")
        return not watched.active and at_rest(self.parts, outs)

    def _never(self) -> bool:
        return all(isinstance(part.gate, NeverGate) for part in self.parts)

    def check_exporting(self) -> None:
        """Raise if the pass is exported as it is: what is solved, and whether, depends on values."""
        if not transforms.exporting() or self.passes.now.how is not None:
            return
        if not self._never():
            self.refuse_graph("torch.export.export")

    def refuse_graph(self, what: str) -> NoReturn:
        """Raise that ``what`` can make no graph of a solve."""
        self.passes.now.open_loop = None
        raise AttachError(
            f"{what} cannot follow span {self.name!r}: whether it is solved, and in how many steps, depends "
            "on values. tw.export(model, images) exports the form with a fixed number of steps, which "
            "tw.unrolled(model, steps) makes for other tools."
        )

    def reached(self) -> Sequence[nn.Module]:
        """What the group's map uses."""
        return self.program.modules()

    @abstractmethod
    def inside(self) -> list[nn.Module]:
        """The modules of the group whose output goes to other modules of the group, each once."""

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Within this, passes through the modules are nothing to the group."""
        now = self.passes.now
        before, now.replaying = now.replaying, True
        try:
            yield
        finally:
            now.replaying = before

    def solve(
        self,
        entries: Sequence[Tensor],
        outs: Sequence[Tensor],
        evaluate: Evaluate,
        constants: Sequence[Tensor],
        frozen: Frozen | None,
        entry: Tensor,
        send: bool = True,
    ) -> tuple[tuple[Tensor, ...], Sequence[Tensor | None] | None]:
        """The settled outputs, and what the messages add there.

        Args:
            entries: (B, ...) the open-loop inputs of the targets.
            outs: (B, ...) the open-loop outputs of the sources.
            evaluate: the group's map.
            constants: its further (B, ...) inputs.
            frozen: what stands still in it.
            entry: (B, ...) the input of its first call.
            send: whether the messages are wanted.

        Returns:
            The outputs; and the messages at the solution for all rows, which one more evaluation of the
            map needs to be there; None if they were not wanted, or nothing was settled.
        """

        def replay(entry: Tensor, signals: Sequence[Tensor | None], *rows: Tensor) -> tuple[Tensor, ...]:
            return evaluate(entry, signals, *rows)[0]

        given, how = (constants, frozen, entry), self.passes.now.how
        if how is not None:
            latest: list[Any] = [None]

            def watched(entry: Tensor, signals: Sequence[Tensor | None], *rows: Tensor) -> tuple[Tensor, ...]:
                latest[0] = signals
                return evaluate(entry, signals, *rows)[0]

            return how(self.parts, entries, outs, watched if send else replay, *given), latest[0]
        if not send:
            return settle(self.parts, entries, outs, replay, *given), None
        values, signals, _ = settle_and_send(self.parts, entries, outs, replay, *given)
        return values, signals

    def keep(self, seen: Sequence[Arguments]) -> None:
        """Keep a pass's constants for counting, if anything was evaluated."""
        record = self.parts[0].last
        if record is not None and record.evaluations:
            self.kept = [
                rebuild(given, lambda v: v.detach() if isinstance(v, Tensor) else v) for given in seen
            ]

    def count(self) -> None:
        """Note the multiply-adds of the last solve in its record."""
        record = self.parts[0].last
        if record is None or not record.evaluations or record.multiply_adds or not self.kept:
            return

        def replay(entry: Tensor, signals: Sequence[Tensor | None], *rows: Tensor) -> tuple[Tensor, ...]:
            with self.quiet():
                return self.program.replay(entry, signals, self.kept, rows)[0]

        each = group_multiply_adds(self.parts, replay, self.program.modules())
        record.multiply_adds = record.evaluations * each

    # Copies and pickles hold no activations; what is counted with them is in the records, which they do hold.
    def __getstate__(self) -> dict[str, Any]:
        # Not where weights have since been given other shapes or devices: a copy must be had all the same.
        with suppress(RuntimeError):
            self.count()
        return {**self.__dict__, "kept": ()}


class ReplayedGroup(AttachedGroup):
    """A group whose calls are replayed one after another.

    The model's own forward is the open-loop pass: hooks watch it, and the one on the group's last call
    returns the settled output.

    Args:
        parts: the wormholes.
        wiring: the calls.
    """

    mode = "replay"
    program: Wiring

    def __init__(self, parts: Sequence[Feedback], wiring: Wiring):
        super().__init__(parts, wiring)
        self.nested = any(node.nested for node in wiring.nodes)
        self.links = wiring.links()
        self.guarded = False  # whether hooks behind the one on the last call are looked after
        first, *later = wiring.nodes
        self.entrance = Placed.before(first.module[0], self._enter)
        for node in later:
            node.module[0].register_forward_pre_hook(self._note, with_kwargs=True)
        self.catches: list[Placed] = []
        for node in wiring.nodes[:-1]:
            for wormhole, leaf in node.states:
                self.catches.append(Placed.behind(node.module[0], _Catch(self, wormhole, leaf)))
        self.exit = Placed.behind(wiring.nodes[-1].module[0], self._leave)

    def inside(self) -> list[nn.Module]:
        return self.program.modules()[:-1]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        now = self.passes.now
        if now.replaying:
            return
        entry = leaf_at((args, kwargs), self.program.nodes[0].entry)
        if isinstance(entry, torch.fx.Proxy):
            self.refuse_graph("torch.fx.symbolic_trace")
        if self.program.copies_entry:
            entry = entry.clone()
        now.by_hand, now.begun = not now.begun, False
        now.open_loop = OpenLoop(self.one_map, entry, self.training)
        if isinstance(module, _BatchNorm):
            self.one_map.hear_first(module, args, kwargs)
        now.seen = [snapshot(args, kwargs) if self.nested else (args, kwargs)]

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        now = self.passes.now
        if now.open_loop is None or now.replaying:
            return
        seen = now.seen
        if len(args) == 1 and not kwargs and len(seen) in self.links and isinstance(args[0], Tensor):
            seen.append(_LINK)  # what comes from the call before lives no longer than in the plain model
        else:
            seen.append(snapshot(args, kwargs) if self.nested else (args, kwargs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        now = self.passes.now
        if now.replaying or now.open_loop is None:
            return None
        outside = False
        if torch.compiler.is_compiling():
            self.check_exporting()
            # A solve takes as many steps as its data need: a compiled model leaves its graph for it.
            # The unrolled form takes none in eval mode.
            outside = now.how is None or (self.training and torch.is_grad_enabled())
        found = self._settle_outside(output) if outside else self._settle(output)
        if self.guarded:
            now.left = versions(output if found is None else found)
        return found

    def _settle(self, output: Any) -> Any:
        """What the group's last call returns, settled."""
        now = self.passes.now
        watched, seen = now.open_loop, now.seen
        assert watched is not None
        now.open_loop, now.seen = None, []
        by_hand = now.by_hand and now.how is None and self.look is not None  # attach itself makes passes
        wiring, entry = self.program, watched.entry
        if len(seen) != len(wiring.nodes):
            raise AttachError(
                f"The pass called {len(seen)} of the {len(wiring.nodes)} modules of span {self.name!r}. It "
                "goes another way through the model than when the wormhole was attached; attach for this way."
            )
        if self.rests(watched, self._found(output)) and wiring.fits(seen):
            self._forget()
            return None
        silence = (None,) * len(self.parts)
        shared = wiring.template(seen)  # no activations, so that replays of two passes can be one map
        constants = wiring.constants(seen)

        def evaluate(entry: Tensor, signals: Sequence[Tensor | None], *rows: Tensor) -> Any:
            with self.quiet():
                return wiring.replay(entry, signals, shared, rows)

        if by_hand and not watched.active:
            self._check_one_pass(self._found(output), lambda: evaluate(entry, silence, *constants)[0])

        def again() -> tuple[Tensor, ...]:
            nonlocal output
            states, output = evaluate(entry, silence, *constants)
            return states

        outs, frozen = watched.finish(self._outs(output), again)
        entries = self._entries(entry, seen)
        rest = bool(wiring.rest)
        values, signals = self.solve(entries, outs, evaluate, constants, frozen, entry, send=rest)
        fresh = None
        if signals is not None:
            with nullcontext() if frozen is None else frozen.replay(None):
                fresh = evaluate(entry, signals, *constants)[1]
        self.keep(shared)
        return wiring.returned(output, fresh, values)

    def _looked_at(self, output: Any) -> Any:
        """:meth:`_settle` behind a compiled graph, which cannot look at the hooks itself."""
        if self.stale is not None:
            self.stale()
        return self._settle(output)

    _settle_outside: Any = torch.compiler.disable(_looked_at)  # type: ignore[call-arg]

    @torch.no_grad()
    def _check_one_pass(self, outs: Sequence[Tensor], replay: Callable[[], Sequence[Tensor]]) -> None:
        """Refuse calls by hand, without a pass of the model, of which one has nothing to do with another.

        Nothing is said of the inputs themselves, which hooks may exchange: what counts is whether the calls,
        made one after another, come to the same.
        """
        try:
            found = replay()
            alike = all(a.shape == b.shape and _close(a, b) for a, b in zip(outs, found, strict=True))
        except RuntimeError:  # activations that do not go together
            alike = False
        if alike:
            return
        self._forget()
        first, last = self.program.nodes[0].path, self.program.nodes[-1].path
        raise AttachError(
            f"{first!r} to {last!r}, the modules of span {self.name!r}, were called by hand, and not with "
            "what the one before them had returned, so that there is no pass whose equation could be solved. "
            "Call the model, or hand on what each module returns. Called once more by itself, the last "
            "module computes what it does in the plain model."
        )

    def _found(self, output: Any) -> list[Any]:
        """The outputs of the sources, as the model has them."""
        found = list(self.passes.now.caught)
        for wormhole, leaf in self.program.nodes[-1].states:
            found[wormhole] = leaf_at(output, leaf)
        return found

    def _outs(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs of the sources, as the solve may keep them."""
        outs = self._found(output)
        self._forget()
        for wormhole, _ in self.program.nodes[-1].states:
            if self.program.copies_outs[wormhole]:
                outs[wormhole] = outs[wormhole].clone()
        return tuple(outs)

    def _forget(self) -> None:
        self.passes.now.caught = [None] * len(self.parts)

    def _entries(self, entry: Tensor, seen: Sequence[Arguments]) -> list[Tensor]:
        entries: list[Any] = [None] * len(self.parts)
        for index, (node, given) in enumerate(zip(self.program.nodes, seen, strict=True)):
            for wormhole in node.messages:
                entries[wormhole] = entry if index == 0 else leaf_at(given, node.entry)
        return entries


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two evaluations of the same are the same, but for what other kernels round otherwise."""
    a, b = a.nan_to_num(), b.nan_to_num()
    size = float(a.abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=0.01 * size)


class _Catch:
    """The hook on an inner source; an object, because closures cannot be pickled."""

    def __init__(self, group: ReplayedGroup, wormhole: int, leaf: int):
        self.group, self.wormhole, self.leaf = group, wormhole, leaf

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        group, now = self.group, self.group.passes.now
        if now.open_loop is not None and not now.replaying:
            value = leaf_at(output, self.leaf)
            now.caught[self.wormhole] = value.clone() if group.program.copies_outs[self.wormhole] else value


class AttachedSpan(nn.Module):
    """One wormhole of a model: its parameters, and the group that it is solved in.

    No module of the model moves and no key of its state dict changes.

    Args:
        feedback: message, gate, policy and settings.
        group: the wormholes that it is solved with.
    """

    def __init__(self, feedback: Feedback, group: AttachedGroup):
        super().__init__()
        self.feedback = feedback
        self.group = group

    @property
    def span(self) -> str:
        """Its name, such as ``"layer4->layer3"``."""
        return self.feedback.span

    @property
    def mode(self) -> str:
        """How its map is evaluated.

        ``"replay"``: its modules are called one after another. ``"rerun"``: the model's forward is run again
        with everything before the span from memory, because the model computes something between its
        modules; right, but slower.
        """
        return self.group.mode

    @property
    def open_loop(self) -> OpenLoop | None:
        """The pass of this thread that is inside of the span; None: there is none."""
        return self.group.open_loop

    def forward(self, value: Any) -> Any:
        """Identity: containers that run all their children in order are not disturbed."""
        return value

    def record(self) -> SpanRecord | None:
        """The record of the last forward pass, multiply-adds counted; None before the first."""
        self.group.count()
        return self.feedback.last

    def extra_repr(self) -> str:
        return f"{self.span}, mode={self.mode}"


def spans(model: nn.Module) -> list[AttachedSpan]:
    """The wormholes attached to a model, in the order in which they were named.

    Each has ``span`` (its name), ``mode`` (``"replay"``, or ``"rerun"`` where the slower fallback is in use),
    ``group`` and ``record()``.
    """
    return [module for module in model.modules() if isinstance(module, AttachedSpan)]


def _groups(of: nn.Module | Sequence[AttachedGroup]) -> list[AttachedGroup]:
    if isinstance(of, nn.Module):
        return list(dict.fromkeys(span.group for span in spans(of)))
    return list(of)


@contextmanager
def settling(of: nn.Module | Sequence[AttachedGroup], how: Settler) -> Iterator[None]:
    """Within this, ``how`` settles the groups (of a model) in place of the ordinary solve."""
    groups = _groups(of)
    passes = [group.passes.now for group in groups]
    before = [now.how for now in passes]
    for now in passes:
        now.how = how
    try:
        yield
    finally:
        for now, old in zip(passes, before, strict=True):
            now.how = old


@contextmanager
def asleep(of: nn.Module | Sequence[AttachedGroup]) -> Iterator[None]:
    """Within this, passes through the model are nothing to the groups."""
    with ExitStack() as stack:
        for group in _groups(of):
            stack.enter_context(group.quiet())
        yield
