"""The stage protocol: what ``attach`` needs to know of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Backbone", "Stage"]


@dataclass(frozen=True)
class Stage:
    """A part of a model that a wormhole may start or end at.

    Attributes:
        name: the path of its module, such as ``"layer3"`` or ``"stages.2"``.
        reduction: input size over its output size, if known.
    """

    name: str
    reduction: int | None = None


class Backbone(ABC):
    """Adapter of a model library; registered as a backbone, asked in the order of the names."""

    @abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Whether this adapter knows the model."""

    @abstractmethod
    def stages(self, model: nn.Module) -> list[Stage]:
        """The model's stages, from the input to the output."""

    @abstractmethod
    def example(self, model: nn.Module, batch: int) -> Tensor:
        """An input of ``batch`` samples on the model's device, of the smallest size that serves."""

    def examples(self, model: nn.Module, batches: Sequence[int]) -> Iterator[Sequence[Any]]:
        """Inputs to try, until the model runs with one: for each try one input of each batch size.

        An input is a tensor, a tuple of arguments or a dict of keyword arguments.
        """
        yield [self.example(model, batch) for batch in batches]

    @abstractmethod
    def channels_last(self, model: nn.Module) -> bool:
        """Whether the model's 4-axis activations are (B, H, W, C)."""

    def gathers(self, model: nn.Module) -> bool:
        """Whether the model returns a list or a dict of its stages' outputs, the last one last."""
        return False

    def path(self, model: nn.Module, name: str) -> str:
        """Where a module that users know by ``name`` is, in a model that was rebuilt from another one."""
        return name
