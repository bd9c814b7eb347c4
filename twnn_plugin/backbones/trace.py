"""Which modules of a model a span is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["candidates", "evaluating"]


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


def candidates(model: nn.Module, taps: Sequence[str], ends: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The modules that a span is made of: the root's children, with containers opened.

    A container is opened if it is a stock ``nn.Sequential`` or ``nn.ModuleList``, or holds two or more
    of the taps (paths of stage ends), or one of the ends that a user has named.
    """
    found: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            inside = sum(tap.startswith(path + ".") for tap in taps)
            named = any(end.startswith(path + ".") for end in ends)
            if type(child) in (nn.Sequential, nn.ModuleList) or inside >= 2 or named:
                visit(path, child)
            else:
                found[path] = child

    visit("", model)
    return found
