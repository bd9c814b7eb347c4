"""A span of a model as three functions: its modules, a replay of them, and the solved map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.backbones.span import settling, spans
from twnn_plugin.solvers import Control, Outcome, Problem, WholeSolver

__all__ = ["Span", "counted_multiply_adds", "span_of"]


@dataclass(frozen=True)
class Span:
    """The span at one batch of inputs.

    Attributes:
        paths: of its modules, in the order in which they are called.
        direct: the plain model's modules, one after another.
        replay: the attached model's replay, without a message.
        evaluate: one evaluation of the map that is solved, message included.
    """

    paths: tuple[str, ...]
    direct: Callable[[], Tensor]
    replay: Callable[[], Tensor]
    evaluate: Callable[[], Tensor]


@dataclass(frozen=True)
class _Catching(WholeSolver):
    """Keeps the equation that it is given, and solves by what it stands for."""

    method: Any
    caught: list[tuple[Problem, Tensor]]

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        self.caught.append((problem, z))
        problem.can_leave = False  # all rows stay in it
        return tw.solvers.solve(self.method, problem, z, control)


def span_of(plain: nn.Module, attached: nn.Module, images: Tensor) -> Span:
    """The span of a model with one wormhole; runs the attached model, which must be open, twice."""
    (span,) = spans(attached)
    kept: dict[str, Any] = {}

    def look(
        parts: Sequence[Any],
        entries: Sequence[Tensor],
        outs: Sequence[Tensor],
        replay: Callable[..., tuple[Tensor, ...]],
        constants: Sequence[Tensor],
        frozen: Any,
        entry: Tensor,
    ) -> tuple[Tensor, ...]:
        kept.update(entry=entry.clone(), replay=replay, constants=tuple(constants))
        return tuple(outs)

    with settling(attached, look):
        attached(images)
    caught: list[tuple[Problem, Tensor]] = []
    before = span.feedback.settings
    tw.configure(attached, solver=_Catching(before.made[0], caught))
    try:
        attached(images)
    finally:
        span.feedback.settings = before
    problem, z = caught[0]
    z = z.clone()
    paths = tuple(node.path for node in span.group.program.nodes)  # type: ignore[attr-defined]
    modules = [plain.get_submodule(path) for path in paths]

    def direct() -> Tensor:
        value = kept["entry"]
        for module in modules:
            value = module(value)
        return value

    def replay() -> Tensor:
        return kept["replay"](kept["entry"], (None,), *kept["constants"])[0]

    return Span(paths, direct, replay, lambda: problem.evaluate(z))


def counted_multiply_adds(plain: nn.Module, attached: nn.Module, span: Span) -> int:
    """Multiply-adds of one evaluation for one row, by what each layer says of itself.

    Convolutions, linear layers and attention, from the shapes that they are called with; the message's
    projection likewise.
    """
    total = 0

    def conv(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    def linear(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.in_features

    def attention(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        tokens, width = args[0].shape[1:]
        total += 2 * tokens * tokens * width

    with _hooked(plain, {nn.Conv2d: conv, nn.Linear: linear}, attention):
        out = span.direct()
    (wormhole,) = spans(attached)
    weight = wormhole.feedback.message.project.weight
    channels = weight.shape[1]
    return total + out[0].numel() // channels * weight.numel()


@contextmanager
def _hooked(model: nn.Module, hooks: dict[type, Any], attention: Any) -> Any:
    handles = []
    for module in model.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind):
                handles.append(module.register_forward_hook(hook))
        if type(module).__name__ == "Attention":
            handles.append(module.register_forward_hook(attention))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
