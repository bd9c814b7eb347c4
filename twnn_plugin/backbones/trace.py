"""Which modules of a model a span is made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["candidates"]


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
