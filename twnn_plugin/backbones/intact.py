"""Seeing that the modules of a model's spans are still where they were when the wormholes were attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import AttachError
from .span import AttachedGroup

__all__ = ["Intact", "guard"]


class Intact:
    """The hook of a model, before each pass: a module that was replaced has taken a span's hooks with it.

    The wormhole would never act again, and nothing would say so. An object, because closures cannot be
    pickled.

    Args:
        model: the model.
        groups: its wormholes.
    """

    def __init__(self, model: nn.Module, groups: Sequence[AttachedGroup]):
        paths = {module: path for path, module in reversed(list(model.named_modules()))}
        self.steps: list[tuple[nn.Module, str, nn.Module]] = []
        """Parent, name and child, from the model down to each module that is looked after."""
        self.spans: list[tuple[str, str]] = []
        """For each of these the child's path and the span that needs it, for messages."""
        known: set[tuple[int, str]] = set()
        for group in groups:
            # Those in between are missed when they are not called: see ReplayedGroup and Rerun.
            modules = group.program.modules()
            for module in dict.fromkeys((modules[0], modules[-1])):
                parent, path = model, ""
                for name in paths[module].split("."):
                    child = parent.get_submodule(name)
                    path = f"{path}.{name}" if path else name
                    if (id(parent), name) not in known:
                        known.add((id(parent), name))
                        self.steps.append((parent, name, child))
                        self.spans.append((path, group.name))
                    parent = child

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_exporting():  # which has stand-ins for the modules; export has looked before
            return
        self.look()

    def look(self) -> None:
        """Raise if a module is not where it was."""
        for parent, name, child in self.steps:
            if getattr(parent, name, None) is not child:
                self._refuse()

    def _refuse(self) -> None:
        for (parent, name, child), (path, span) in zip(self.steps, self.spans, strict=True):
            if getattr(parent, name, None) is child:
                continue
            raise AttachError(
                f"{path!r}, a {type(child).__name__} of span {span!r}, was removed or replaced after its "
                "wormhole was attached (by timm's reparameterize_model, say), so that the wormhole could not "
                "act. Do that to the plain model first, attach then, and load the weights of the wormholes."
            )


def guard(model: nn.Module, groups: Sequence[AttachedGroup]) -> Intact:
    """Let each pass through a model begin with a look at the modules of its spans."""
    made = Intact(model, groups)
    for group in groups:
        group.look = made.look
    model.register_forward_pre_hook(made)
    return made
