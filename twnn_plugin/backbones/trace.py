"""Recording which modules a model calls, and with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..trees import leaves

__all__ = ["CallRecord", "candidates", "evaluating", "trace"]


@dataclass
class CallRecord:
    """One call of one module.

    Attributes:
        path: where the module is in the model.
        module: the module.
        args: what it was given.
        kwargs: likewise.
        output: what it returned.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def inputs(self) -> list[Any]:
        """The leaves of the arguments, in order."""
        return list(leaves((self.args, self.kwargs)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def candidates(model: nn.Module, taps: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that a span is made of: the root's children, with containers opened.

    A container is opened if it is a stock ``nn.Sequential`` or ``nn.ModuleList``, or holds two or more
    of the taps (paths of stage ends).
    """
    found: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            inside = sum(tap.startswith(path + ".") for tap in taps)
            if type(child) in (nn.Sequential, nn.ModuleList) or inside >= 2:
                visit(path, child)
            else:
                found[path] = child

    visit("", model)
    return found


def trace(model: nn.Module, nodes: dict[str, nn.Module], example: Tensor) -> tuple[list[CallRecord], Any]:
    """Run the model once (in the caller's mode) and record the calls of ``nodes`` in their order."""
    calls: list[CallRecord] = []
    depth = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                calls.append(CallRecord(path, module, args, kwargs, output))

        return hook

    handles = []
    try:
        for path, module in nodes.items():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
        result = model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls, result
