"""What a policy is: who is iterated, at one span or among several layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import OptionError
from ..types import PolicyView
from .selection import Selection, SelectionView

__all__ = ["Policy", "PolicyView", "SelectionPolicy", "SpanPolicy"]


class Policy(nn.Module, ABC):
    """Picks the samples that are iterated. Policies are modules, so that they may learn.

    A policy answers one of two questions, or both: of one span, who is iterated
    (:meth:`forward`); of a network with several layers that can be iterated, which of them each sample
    iterates next, or none (:meth:`select`). Derive from :class:`SpanPolicy` or :class:`SelectionPolicy`
    for one of them.
    """

    def forward(self, view: PolicyView) -> Tensor:
        """(B,) bool: true where the span is to be iterated."""
        raise OptionError(
            f"Policy {type(self).__name__} picks among the layers of a network (models named 'dynalay_*'), "
            "and has no answer for a single span. Use 'gate', 'always', 'never' or 'random' there."
        )

    def select(self, view: SelectionView) -> Selection:
        """Which layer each of the (b,) samples of the view iterates next; none: it is done."""
        raise OptionError(
            f"Policy {type(self).__name__} decides about single spans, and has no answer to which layer of a "
            "network to iterate. Use 'dynalay', 'entropy', 'always', 'never' or 'random' there."
        )

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        """Told once, before the first :meth:`select`, which layers there are and how wide each is.

        Args:
            layers: names of the layers that can be iterated.
            widths: pooled features of each.
        """


class SpanPolicy(Policy):
    """A policy for single spans."""

    @abstractmethod
    def forward(self, view: PolicyView) -> Tensor:
        """(B,) bool: true where the span is to be iterated."""


class SelectionPolicy(Policy):
    """A policy that picks among the layers of a network."""

    @abstractmethod
    def select(self, view: SelectionView) -> Selection:
        """Which layer each of the (b,) samples of the view iterates next; none: it is done."""
