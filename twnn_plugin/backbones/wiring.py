"""Replaying calls on other inputs: which argument comes from where."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AttachError
from ..trees import leaves, rebuild
from .flow import Call, Flow, Use, leaf_at, rows_per_sample
from .plan import Plan, Refusal

__all__ = [
    "Arguments",
    "Node",
    "Placed",
    "Program",
    "Source",
    "Turns",
    "Wiring",
    "snapshot",
    "split",
    "versions",
    "wire",
]

Arguments = tuple[Any, Any]
"""(args, kwargs) of one call."""


@dataclass(frozen=True)
class Source:
    """Where one leaf of a call's arguments comes from.

    Attributes:
        wire: (position in the chain, leaf of that call's output); None: a constant of the pass.
        rows: for a constant tensor, its rows per sample; 0 if it does not depend on the batch.
        count: for a constant number that counts samples, how many times.
        entry: whether it is the input of the chain.
        dims: the axes of a constant tensor; None: it was none.
    """

    wire: tuple[int, int] | None = None
    rows: int = 0
    count: int = 0
    entry: bool = False
    dims: int | None = None

    @property
    def kept(self) -> bool:
        """Whether it is the same whatever the rows are."""
        return self.wire is None and not self.rows and not self.count and not self.entry


@dataclass(frozen=True)
class Node:
    """One call of a chain.

    Attributes:
        path: the module's path, for messages.
        module: the module. Held in a tuple, so that it does not become a child of the holder.
        sources: one for each leaf of (args, kwargs).
        messages: the wormholes whose message enters here.
        entry: the leaf where messages, or the group's input, enter.
        states: (wormhole, leaf of the output) for those whose source this is.
        nested: whether there are lists or dicts among the arguments.
    """

    path: str
    module: tuple[nn.Module]
    sources: tuple[Source, ...]
    messages: tuple[int, ...]
    states: tuple[tuple[int, int], ...]
    entry: int = 0
    nested: bool = False


class Turns:
    """Lets one thread at a time stand in for the modules of a model; the others wait.

    Copies and pickles begin with nobody's turn.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0  # written by whoever has the turn

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Within this, it is this thread's turn; a thread may take its own once more."""
        with self.lock:
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1

    def taken(self) -> bool:
        """Whether it is anybody's turn."""
        return self.depth > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(eq=False)
class Placed:
    """A hook on a module, and where it stands among the others there.

    Attributes:
        module: the module.
        hook: the hook.
        handle: what removes it.
        ahead: whether it is called before the module; else behind it.
    """

    module: nn.Module
    hook: Callable[..., Any]
    handle: RemovableHandle
    ahead: bool

    @classmethod
    def before(cls, module: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> Placed:
        """Register ``hook(module, args, kwargs)``."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)
        return cls(module, hook, handle, True)

    @classmethod
    def behind(cls, module: nn.Module, hook: Callable[..., Any], prepend: bool = False) -> Placed:
        """Register ``hook(module, args, output)``."""
        return cls(module, hook, module.register_forward_hook(hook, prepend=prepend), False)

    @property
    def place(self) -> int:
        """Its key among the hooks."""
        return self.handle.id

    def moved(self, prepend: bool) -> None:
        """Register it anew, before all the others or behind them."""
        old, register = self.handle, Placed.before if self.ahead else Placed.behind
        self.handle = register(self.module, self.hook, prepend).handle
        old.remove()  # afterwards, so that no other thread's pass goes by without it


def versions(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors in nested values, each with a number that changes when it is written to."""
    found = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
    known = not torch.compiler.is_compiling()
    return [(leaf, leaf._version if known and not leaf.is_inference() else 0) for leaf in found]


class Program(ABC):
    """A group of spans as a function of its entry, the messages and what is constant in a pass."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """The modules that are replayed, each once."""

    @abstractmethod
    def constants(self, seen: Sequence[Arguments]) -> tuple[Tensor, ...]:
        """The (B, ...) constants of a pass that have rows for each sample."""

    @abstractmethod
    def replay(
        self,
        entry: Tensor,
        signals: Sequence[Tensor | None],
        seen: Sequence[Arguments],
        rows: Sequence[Tensor] = (),
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Run the spans.

        Args:
            entry: (b, ...) input of the first call.
            signals: for each wormhole what is added at its target, like the target's input, or None.
            seen: what the calls were given in the model's own pass, for the constants.
            rows: :meth:`constants`, gathered for the rows of ``entry``.

        Returns:
            For each wormhole the output of its source; and all that the last call returned.
        """


@dataclass(frozen=True)
class Wiring(Program):
    """A chain of calls, wired by the identity of the tensors that pass between them.

    Attributes:
        nodes: the calls.
        states: how many wormholes there are.
        copies_entry: whether the first call changes its input in place.
        copies_outs: for each wormhole, whether its state is changed in place later on.
        rest: leaves of the last call's output, besides its state, that the model goes on with.
    """

    nodes: tuple[Node, ...]
    states: int
    copies_entry: bool
    copies_outs: tuple[bool, ...]
    rest: tuple[int, ...] = ()

    def modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(node.module[0] for node in self.nodes))

    def constants(self, seen: Sequence[Arguments]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        batch = self._batch(seen)
        for node, given in zip(self.nodes, seen, strict=True):
            if not any(source.rows for source in node.sources):
                continue
            for leaf, source in zip(leaves(given), node.sources, strict=True):
                if source.rows and isinstance(leaf, Tensor):
                    found.append(split(leaf, _rows_now(node, source, leaf, batch)))
        return tuple(found)

    def _batch(self, seen: Sequence[Arguments]) -> int:
        return leaf_at(seen[0], self.nodes[0].entry).shape[0]

    def links(self) -> frozenset[int]:
        """The calls whose only argument comes from another call: nobody asks what it was."""
        return frozenset(
            index
            for index, node in enumerate(self.nodes)
            if len(node.sources) == 1 and node.sources[0].wire is not None and not node.messages
        )

    def fits(self, seen: Sequence[Arguments]) -> bool:
        """Whether the calls were given as many arguments as ever, as far as a glance tells."""
        return [len(args) + len(kwargs) for args, kwargs in seen] == self._widths

    @cached_property
    def _widths(self) -> list[int]:
        """The arguments of each call."""
        return [len(node.sources) for node in self.nodes]

    def template(self, seen: Sequence[Arguments]) -> list[Arguments]:
        """What the calls were given, without what comes from the rows.

        Raises:
            AttachError: a call was given other arguments than when the wormhole was attached.
        """
        kept = []
        batch = self._batch(seen)
        for node, given in zip(self.nodes, seen, strict=True):
            if sum(1 for _ in leaves(given)) != len(node.sources):
                raise AttachError(
                    f"{node.path!r} is given other arguments than when its wormhole was attached, such as a "
                    "mask. Attach the wormhole to a model that is called in this way (example=...)."
                )
            sources = iter(node.sources)
            kept.append(rebuild(given, lambda leaf, n=node, s=sources: _template(n, next(s), leaf, batch)))
        return kept

    def replay(
        self,
        entry: Tensor,
        signals: Sequence[Tensor | None],
        seen: Sequence[Arguments],
        rows: Sequence[Tensor] = (),
    ) -> tuple[tuple[Tensor, ...], Any]:
        outputs: list[list[Any]] = []
        states: list[Any] = [None] * self.states
        fed = iter(rows)
        result: Any = None
        for index, (node, given) in enumerate(zip(self.nodes, seen, strict=True)):
            position = -1

            def pick(leaf: Any, node: Node = node, index: int = index) -> Any:
                nonlocal position
                position += 1
                source = node.sources[position]
                if index == 0 and position == node.entry:
                    value = self._sent(node, entry, signals)
                    return value.clone() if self.copies_entry and value is entry else value
                if source.wire is not None:
                    leaf = outputs[source.wire[0]][source.wire[1]]
                elif isinstance(leaf, _Fed):
                    leaf, fold = next(fed), leaf.rows > 1
                    leaf = leaf.flatten(0, 1) if fold else leaf
                elif source.count:
                    leaf = source.count * entry.shape[0]
                return self._sent(node, leaf, signals) if position == node.entry else leaf

            args, kwargs = given
            if not kwargs and len(args) == 1 and not isinstance(args[0], (tuple, list, dict)):
                result = node.module[0](pick(args[0]))  # as nearly all are called: no trees to go through
            else:
                args, kwargs = rebuild(given, pick)
                result = node.module[0](*args, **kwargs)
            outputs.append([result] if isinstance(result, Tensor) else list(leaves(result)))
            for wormhole, leaf in node.states:
                state = outputs[-1][leaf]
                states[wormhole] = state.clone() if self.copies_outs[wormhole] else state
        return tuple(states), result

    def returned(self, output: Any, refreshed: Any, values: Sequence[Tensor]) -> Any:
        """What the last call returns to the model.

        Args:
            output: what it returned in the open-loop pass.
            refreshed: what it returned at the solution; None: nothing was settled.
            values: the settled states.
        """
        wormhole, leaf = self.nodes[-1].states[0]
        fresh = list(leaves(output if refreshed is None else refreshed))
        changed = {place: fresh[place] for place in self.rest}
        # The model changes it in place later on, which it may not do to what the solve keeps.
        changed[leaf] = values[wormhole].clone() if self.copies_outs[wormhole] else values[wormhole]
        places = iter(range(len(fresh)))

        def choose(value: Any) -> Any:
            return changed.get(next(places), value)

        return rebuild(output, choose)

    @staticmethod
    def _sent(node: Node, value: Any, signals: Sequence[Tensor | None]) -> Any:
        for wormhole in node.messages:
            signal = signals[wormhole]
            value = value if signal is None else value + signal
        return value


@dataclass(frozen=True)
class _Fed:
    """Stands in a template for a constant that comes from the rows, of which each sample has so many."""

    rows: int


def _template(node: Node, source: Source, leaf: Any, batch: int) -> Any:
    """What is kept of one leaf of a call's arguments; None: it comes from a wire."""
    if source.wire is not None or source.count or source.entry:
        return None
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return leaf
    if source.rows:
        return _Fed(_rows_now(node, source, leaf, batch))
    if source.dims is None and leaf.shape[0] == batch > 1:
        raise AttachError(
            f"{node.path!r} is given a tensor of shape {tuple(leaf.shape)}, perhaps a mask with a row for "
            "each sample, where it was given none when its wormhole was attached. Attach the wormhole to the "
            "plain model with an example that has it: tw.attach(model, example=...)."
        )
    return leaf


def _rows_now(node: Node, source: Source, leaf: Tensor, batch: int) -> int:
    """The rows per sample of a constant in this pass: of windows, other image sizes have other numbers."""
    if leaf.dim() == source.dims and leaf.shape[0] == source.rows * batch:
        return source.rows
    if leaf.dim() == source.dims and batch and leaf.shape[0] % batch == 0:
        return leaf.shape[0] // batch
    raise AttachError(
        f"{node.path!r} is given a tensor of shape {tuple(leaf.shape)}, which has no rows for each of the "
        f"{batch} samples, as it had when its wormhole was attached. Attach the wormhole to a model that is "
        "called in this way (example=...)."
    )


def snapshot(args: Any, kwargs: Any) -> Arguments:
    """Arguments in containers of their own: a module may put other things into the lists it is given."""
    return rebuild((args, kwargs), lambda leaf: leaf)


def split(value: Tensor, rows: int) -> Tensor:
    """(B * rows, ...) to (B, rows, ...), so that it can be gathered by samples."""
    return value.unflatten(0, (-1, rows)) if rows > 1 else value


def wire(flow: Flow, other: Flow, found: Plan) -> Wiring:
    """Wire the calls of a plan.

    Args:
        flow: the pass that the plan was made from.
        other: a pass with another batch size, which tells what depends on the batch.
        found: the plan.

    Raises:
        Refusal: something mixes samples.
    """
    places = {call: index for index, call in enumerate(found.calls)}
    nodes = []
    for index in found.calls:
        call, twin = flow.calls[index], other.calls[index]
        sources = []
        for position, (use, same) in enumerate(zip(call.inputs, twin.inputs, strict=True)):
            entry = index == found.first and position == found.entry_of(index)
            inside = isinstance(use, Use) and use.direct is not None and use.direct[0] in places
            if inside and not entry:
                assert use.direct is not None
                sources.append(Source(wire=(places[use.direct[0]], use.direct[1])))
            elif entry:
                sources.append(Source(entry=True))
            else:
                sources.append(_constant(call, use, same, flow.batch, other.batch))
        messages = tuple(i for i, end in enumerate(found.ends) if end.target == index)
        states = tuple((i, out[1]) for i, out in enumerate(found.outs) if out[0] == index)
        nodes.append(
            Node(
                call.path,
                (call.module,),
                tuple(sources),
                messages,
                states,
                found.entry_of(index),
                call.nested,
            )
        )
    return Wiring(tuple(nodes), len(found.ends), found.copies_entry, found.copies_outs, found.rest)


def _constant(call: Call, use: Any, same: Any, batch: int, other: int) -> Source:
    if isinstance(use, Use):
        return Source(rows=_rows(call, use.shape, same.shape, batch, other), dims=len(use.shape))
    if isinstance(use, int) and not isinstance(use, bool) and use != same:
        if use % batch == 0 and use // batch * other == same:
            return Source(count=use // batch)
        raise Refusal(f"{call.path!r} is given a number that depends on the batch: {use} and {same}.")
    return Source()


def _rows(call: Call, shape: Any, same: Any, batch: int, other: int) -> int:
    try:
        return rows_per_sample(shape, same, batch, other)
    except ValueError as error:
        raise Refusal(
            f"{call.path!r} is given a tensor that depends on the batch in a way that cannot be split by "
            f"samples: {error}"
        ) from None
