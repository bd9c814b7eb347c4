"""Proof, when a wormhole is attached, that its span can be replayed: three runs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError
from ..trees import rebuild
from .trace import CallRecord
from .wiring import Wiring

__all__ = ["check_span"]


def check_span(
    name: str, model: nn.Module, example: Tensor, wiring: Wiring, calls: Sequence[CallRecord], result: Any
) -> None:
    """Refuse a span whose replay is not what the model computes.

    Args:
        name: of the span, for messages.
        model: the model, in eval mode.
        example: the input that ``calls`` and ``result`` were recorded with.
        wiring: the span's wiring.
        calls: the span's calls.
        result: what the model returned.

    Raises:
        AttachError: (a) the replay differs from the recorded output or destroys its input, (b) it
            reacts to a change of the span's input other than the model does, or (c) something inside the
            span is used outside.
    """
    seen = [(call.args, call.kwargs) for call in calls]
    rows = wiring.constants(seen)
    entry, out = calls[0].inputs()[0], calls[-1].output
    if not isinstance(out, Tensor):
        raise AttachError(f"Span {name!r} does not end in one tensor but in a {type(out).__name__}.")
    again = wiring.replay(entry, seen, rows)
    if not torch.equal(again, out):
        raise AttachError(f"Span {name!r} cannot be replayed: its output differs from the model's own pass.")
    # Down, so that an activation that works in place shows: it cuts the new negatives off.
    shifted = entry - 0.5 * entry.abs().mean()
    given = shifted.clone()
    answer = wiring.replay(given, seen, rows)
    if not torch.equal(given, shifted):
        raise AttachError(
            f"Span {name!r} cannot be iterated: {calls[0].path!r} changes its input in place, which is then "
            "lost. Begin the span at the module after it."
        )
    if not torch.equal(answer, _perturbed(model, example, calls, shifted)):
        raise AttachError(
            f"Span {name!r} cannot be iterated: the model computes something between its modules that a "
            "replay does not follow (it answered a changed input differently)."
        )
    if not _same(_poisoned(model, example, calls, out), result):
        raise AttachError(
            f"Span {name!r} cannot be iterated: the model uses activations from inside it elsewhere, and "
            "they would stay those of the open-loop pass."
        )


def _perturbed(model: nn.Module, example: Tensor, calls: Sequence[CallRecord], value: Tensor) -> Any:
    """The output of the span in the model's own pass with the span's input replaced."""
    caught: list[Any] = []
    once = [True]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not once:
            return None
        once.clear()
        replaced = iter([value])
        return rebuild((args, kwargs), lambda leaf: next(replaced, leaf))

    handles = [
        calls[0].module.register_forward_pre_hook(enter, with_kwargs=True),
        calls[-1].module.register_forward_hook(lambda module, args, output: caught.append(output)),
    ]
    _run(model, example, handles)
    return caught[-1]


def _poisoned(model: nn.Module, example: Tensor, calls: Sequence[CallRecord], out: Tensor) -> Any:
    """What the model returns when everything inside the span is NaN and its output is restored."""
    last = calls[-1].module

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        if module is last:
            return out
        return rebuild(output, lambda v: torch.full_like(v, float("nan")) if _floating(v) else v)

    modules = dict.fromkeys(call.module for call in calls)
    return _run(model, example, [module.register_forward_hook(poison) for module in modules])


def _run(model: nn.Module, example: Tensor, handles: Sequence[Any]) -> Any:
    try:
        return model(example)
    finally:
        for handle in handles:
            handle.remove()


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
