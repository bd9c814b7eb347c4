"""One wormhole in a model at hand: hooks on the span's modules, replay instead of surgery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..blocks import Feedback, SpanRecord
from ..blocks.count import multiply_adds
from ..blocks.one_map import OneMap
from ..blocks.open_loop import OpenLoop
from ..errors import AttachError
from ..trees import leaves
from .wiring import Wiring

__all__ = ["AttachedSpan"]


class AttachedSpan(nn.Module):
    """Hooks a span: the model's own forward is the open-loop pass, its output is then settled.

    No module moves and no key of the state dict changes; the wormhole's parameters are this module's.

    Args:
        feedback: message, gate, policy and settings.
        wiring: the span's calls.
    """

    def __init__(self, feedback: Feedback, wiring: Wiring):
        super().__init__()
        self.feedback = feedback
        self.wiring = wiring
        self.one_map = OneMap(wiring.modules())
        self.seen: list[tuple[Any, Any]] = []
        self.open_loop: OpenLoop | None = None
        self.template: tuple[Any, ...] = ()  # the last pass's constants, for counting
        self.replaying = False
        for module in wiring.modules():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
        wiring.nodes[-1].module[0].register_forward_hook(self._leave, with_kwargs=True)

    def forward(self, value: Any) -> Any:
        """Identity: containers that run all their children in order are not disturbed."""
        return value

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.replaying:
            return
        if self.open_loop is None:
            if module is self.wiring.nodes[0].module[0]:
                self.open_loop = OpenLoop(self.one_map, next(leaves((args, kwargs))), self.training)
                self.seen = [(args, kwargs)]
            return
        if module is self.wiring.nodes[0].module[0] and len(self.wiring.modules()) == len(self.wiring.nodes):
            # The last pass did not reach the end of the span (an exception): start afresh.
            self.open_loop = None
            self._enter(module, args, kwargs)
            return
        self.seen.append((args, kwargs))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.replaying or self.open_loop is None or len(self.seen) < len(self.wiring.nodes):
            return None
        watched, seen = self.open_loop, tuple(self.seen)
        self.open_loop, self.seen = None, []
        constants = self.wiring.constants(seen)
        entry = watched.entry

        def replay(entry: Tensor, *rows: Tensor) -> Tensor:
            with self._replaying():
                return self.wiring.replay(entry, seen, rows)

        if not isinstance(output, Tensor):
            raise AttachError(f"Span {self.feedback.span!r} no longer returns a tensor.")
        out, frozen = watched.finish(output, lambda: replay(entry, *constants))
        settled = self.feedback.settle(entry, out, replay, constants, frozen)
        self.template = self.wiring.template(seen)
        return settled

    def record(self) -> SpanRecord | None:
        """The record of the last forward pass, multiply-adds counted; None before the first."""
        record = self.feedback.last
        if record is None or not record.evaluations or record.multiply_adds or not self.template:
            return record

        def replay(entry: Tensor, *rows: Tensor) -> Tensor:
            with self._replaying():
                return self.wiring.replay(entry, self.template, rows)

        each = multiply_adds(self.feedback, replay, self.wiring.modules())
        record.multiply_adds = record.evaluations * each
        return record

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        before, self.replaying = self.replaying, True
        try:
            yield
        finally:
            self.replaying = before

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": [], "open_loop": None, "template": (), "replaying": False}
