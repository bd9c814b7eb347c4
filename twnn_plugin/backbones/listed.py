"""Any module with stages that the user names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError, UnknownNameError, nearest
from ..trees import leaves, rebuild
from .base import Backbone, Stage

__all__ = ["ListedBackbone"]


class ListedBackbone(Backbone):
    """Stages as they were given to ``attach(model, stages=[...], example=...)``.

    Args:
        model: the model.
        stages: its stages from the input to the output, by path or as modules; None: as ``known`` says.
        example: an input of the model, (B, ...): a tensor, a tuple of arguments or a dict of keyword
            arguments, all tensors in it with one row per sample; None: as ``known`` says.
        known: the adapter that knows the rest of the model, if there is one.

    Raises:
        AttachError: something is missing, or is no input.
        UnknownNameError: no such module.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Any] | None, example: Any, known: Backbone | None):
        self.known = known
        self.listed = None if stages is None else _listed(model, stages)
        if self.listed is None and known is None:
            raise AttachError(
                f"No backbone adapter knows {type(model).__name__}. Name its stages, from the input to the "
                "output, and give an input: tw.attach(model, stages=['encoder.0', 'encoder.1'], example=x). "
                "Or register an adapter of your own (docs/plugins.md), or wrap a module directly with "
                "tw.blocks.get('wormhole')."
            )
        self.given = None if example is None else _checked(example)
        if self.given is None and known is None:
            raise AttachError(
                f"Nothing is known of the input of {type(model).__name__}. Give one that it runs with: "
                "tw.attach(model, stages=[...], example=torch.randn(2, 3, 32, 32))."
            )

    def claims(self, model: nn.Module) -> bool:
        return True

    def stages(self, model: nn.Module) -> list[Stage]:
        if self.listed is not None:
            return [Stage(name) for name in self.listed]
        assert self.known is not None
        return self.known.stages(model)

    def example(self, model: nn.Module, batch: int) -> Tensor:
        value = self._example(model, batch)
        return next(leaf for leaf in leaves(value) if isinstance(leaf, Tensor))

    def examples(self, model: nn.Module, batches: Sequence[int]) -> Iterator[Sequence[Any]]:
        if self.given is None:
            assert self.known is not None
            yield from self.known.examples(model, batches)
            return
        yield [self._example(model, batch) for batch in batches]

    def _example(self, model: nn.Module, batch: int) -> Any:
        if self.given is None:
            assert self.known is not None
            return self.known.example(model, batch)

        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.detach()[torch.arange(batch, device=leaf.device) % leaf.shape[0]]

        return rebuild(self.given, resized)

    def channels_last(self, model: nn.Module) -> bool:
        return self.known is not None and self.known.channels_last(model)

    def gathers(self, model: nn.Module) -> bool:
        return self.known is not None and self.known.gathers(model)

    def path(self, model: nn.Module, name: str) -> str:
        return name if self.known is None else self.known.path(model, name)


def _listed(model: nn.Module, stages: Sequence[Any]) -> list[str]:
    paths = {module: name for name, module in reversed(list(model.named_modules())) if name}
    known = list(paths.values())
    if isinstance(stages, (str, nn.Module)) or not list(stages):
        raise AttachError(
            f"stages is a list of paths or modules, from the input to the output; got {stages!r}."
        )
    names = []
    for stage in stages:
        if isinstance(stage, nn.Module):
            if stage not in paths:
                raise UnknownNameError(
                    f"The stage {type(stage).__name__} is no module of this {type(model).__name__}."
                )
            names.append(paths[stage])
        elif stage in dict(model.named_modules()) and stage:
            names.append(stage)
        else:
            shown = ", ".join(known[:16]) + (", ..." if len(known) > 16 else "")
            raise UnknownNameError(f"Unknown stage {stage!r}.{nearest(str(stage), known)} Modules: {shown}.")
    return names


def _checked(example: Any) -> Any:
    tensors = [leaf for leaf in leaves(example) if isinstance(leaf, Tensor)]
    sizes = {tuple(t.shape[:1]) for t in tensors}
    if not tensors or len(sizes) != 1 or sizes <= {(), (0,)}:
        raise AttachError(
            "example is an input of the model with at least one sample, batch first in every tensor; got "
            f"{[tuple(t.shape) for t in tensors] or type(example).__name__}."
        )
    return example
