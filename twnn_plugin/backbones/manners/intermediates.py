"""Activations from inside of a span, at its fixed point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import Feedback, GroupReplay
from ...blocks.companion import PerThread
from ...blocks.one_map import Frozen
from ...blocks.settle import settle_and_send
from ...errors import AttachError
from ...trees import leaves, rebuild
from ..span import AttachedGroup, asleep, settling

__all__ = ["settled_taps"]


def settled_taps(
    model: nn.Module, groups: Sequence[AttachedGroup], nodes: Sequence[nn.Module], run: Callable[[], Any]
) -> Any:
    """The result of a pass that gathers activations, those inside of spans at their fixed points.

    The pass is made once as it is, which solves the spans. Where any row is open, the spans are evaluated
    once at their solution, and ``run`` is called again with every module answering from memory: from that
    evaluation inside of a span, from the first pass elsewhere. So whatever ``run`` does between the modules
    is done to settled activations, gradients and all, while nothing is computed, drawn or counted twice.
    Closed rows, and rows whose solve failed, keep their open-loop values bit for bit.

    Args:
        model: the model.
        groups: its spans.
        nodes: the modules that make up the model, none inside another.
        run: makes the pass.

    Raises:
        AttachError: the pass left a span in the middle, or changed an activation in place.
    """
    memory = _Memory(groups)
    with memory.listening(nodes), ExitStack() as stack:
        for group in groups:
            stack.enter_context(settling([group], _Settler(group, memory)))
        result = run()
    for group in groups:
        if group.unfinished():
            raise AttachError(
                f"The pass ended inside of span {group.name!r}, so that nothing in it is settled. Ask for an "
                "activation from behind it as well, or leave stop_early=False."
            )
    if not memory.fresh:
        return result
    before = memory.versions()
    with asleep(groups), memory.answering(nodes):
        result = run()
    if memory.versions() != before:
        raise AttachError(
            f"{type(model).__name__} changes activations in place between its modules, so that those inside "
            "of a span cannot be gathered. Catch those behind the span with forward hooks of your own."
        )
    return result


@dataclass
class _Heard:
    """One call of a module: what it was given and what it returned."""

    module: nn.Module
    given: tuple[Any, ...]
    output: Any


class _Thread(PerThread):
    """Whether this is the thread whose pass is remembered."""

    def __init__(self) -> None:
        self.own = False


@dataclass
class _Memory:
    """The calls of a pass.

    Attributes:
        groups: the spans; what their solves call is not part of the pass.
        calls: the calls, in their order.
        fresh: settled outputs of modules inside of spans.
        note: where the calls of a replay go, while one is listened to.
    """

    groups: Sequence[AttachedGroup]
    calls: list[_Heard] = field(default_factory=list)
    fresh: dict[nn.Module, Any] = field(default_factory=dict)
    note: dict[nn.Module, Any] | None = None

    def __post_init__(self) -> None:
        self.thread = _Thread()
        self.thread.own = True

    def _hear(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        # Another thread's pass has a memory of its own. Of a hook that was removed while that pass was
        # halted, torch no longer knows that it takes kwargs.
        if not self.thread.own:
            return
        if self.note is not None:
            self.note[module] = output
        elif not any(group.replaying for group in self.groups):
            self.calls.append(_Heard(module, tuple(leaves((args, kwargs))), output))

    @contextmanager
    def listening(self, nodes: Sequence[nn.Module]) -> Iterator[None]:
        """Within this, calls are remembered."""
        with ExitStack() as stack:
            for node in nodes:
                stack.callback(node.register_forward_hook(self._hear, with_kwargs=True).remove)
            yield

    def open_loop(self, module: nn.Module) -> Any:
        """What a module of a span returned in this pass."""
        return next((heard.output for heard in reversed(self.calls) if heard.module is module), None)

    def versions(self) -> list[int]:
        """A number for each remembered tensor, which changes when it is changed in place."""
        kept = (leaves((heard.given, heard.output)) for heard in self.calls)
        return [leaf._version for some in kept for leaf in some if isinstance(leaf, Tensor)]

    @contextmanager
    def answering(self, nodes: Sequence[nn.Module]) -> Iterator[None]:
        """Within this, modules return what is remembered instead of computing it."""
        ahead = iter(self.calls)
        spanned = {module for group in self.groups for module in group.program.modules()}
        with self.groups[0].turns.mine():
            kept = [(node, vars(node).get("forward")) for node in nodes]
            try:
                for node, own in kept:
                    setattr(node, "forward", _Answer(node, own, self, ahead, spanned))  # noqa: B010
                yield
            finally:
                for node, own in kept:
                    if own is None:
                        delattr(node, "forward")
                    else:
                        setattr(node, "forward", own)  # noqa: B010


@dataclass
class _Answer:
    """Stands for a module's ``forward`` while the memory answers."""

    module: nn.Module
    own: Callable[..., Any] | None
    memory: _Memory
    ahead: Iterator[_Heard]
    spanned: set[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.memory.thread.own:
            return self._computed(*args, **kwargs)
        heard = next(self.ahead, None)
        if heard is None or heard.module is not self.module:
            raise AttachError(
                "The model calls other modules in a second pass; activations cannot be gathered."
            )
        if self.module in self.memory.fresh:
            return self.memory.fresh[self.module]
        if self.module in self.spanned or all(
            _same(a, b) for a, b in zip(leaves((args, kwargs)), heard.given, strict=True)
        ):
            return heard.output
        # A normalisation that is applied to each activation that is gathered, say.
        return self._computed(*args, **kwargs)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own or type(self.module).forward.__get__(self.module)
        return forward(*args, **kwargs)


def _same(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return a.shape == b.shape and torch.equal(a, b)


class _Settler:
    """Settles a group and then looks into its solution."""

    def __init__(self, group: AttachedGroup, memory: _Memory):
        self.group, self.memory = group, memory

    def __call__(
        self,
        parts: Sequence[Feedback],
        entries: Sequence[Tensor],
        outs: Sequence[Tensor],
        replay: GroupReplay,
        constants: Sequence[Tensor] = (),
        frozen: Frozen | None = None,
        entry: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        values, signals, rows = settle_and_send(parts, entries, outs, replay, constants, frozen, entry)
        if signals is None:
            return values
        self.memory.note = {}
        with nullcontext() if frozen is None else frozen.replay(None):
            replay(entries[0] if entry is None else entry, signals, *constants)
        found, self.memory.note = self.memory.note, None
        for module in self.group.inside():
            before = self.memory.open_loop(module)
            self.memory.fresh[module] = _merged(rows, found[module], before)
        return values


def _merged(rows: Tensor, settled: Any, before: Any) -> Any:
    """The settled output for the rows that are, and the open-loop one for the others."""
    old = leaves(before)

    def choose(leaf: Any) -> Any:
        other = next(old)
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != rows.shape[0]:
            return leaf
        return torch.where(rows.view(-1, *[1] * (leaf.dim() - 1)), leaf, other)

    return rebuild(settled, choose)
