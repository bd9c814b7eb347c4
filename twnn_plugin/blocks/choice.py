"""What a solve knows of each of its wormholes: who is iterated, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import transforms
from ..gates import Gate
from .aids import Aids
from .companion import Companion
from .message import Message
from .record import SpanRecord
from .settings import SolveSettings

__all__ = ["Choice", "Part", "Pending"]


class Choice(NamedTuple):
    """Who is iterated and how strongly.

    Attributes:
        opened: (B,) bool.
        amount: (B,), or (B, C) for a gate of each channel: the factor on the message; 0 where closed.
        probability: like ``amount``.
        margin: (B,) for gates that learn from difficulty; else None.
    """

    opened: Tensor
    amount: Tensor
    probability: Tensor
    margin: Tensor | None

    def levers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the message is multiplied with where gradients are wanted.

        Returns:
            ``opened`` (B,), and three factors like ``amount``: ``weight`` on the message, ``silenced``
            to be taken off it without a gradient, and ``lever``, zero with the gate's gradient, on
            the message without one.
        """
        opened = self.opened if self.amount.dim() == 1 else self.opened[:, None]
        weight = torch.where(opened, self.amount, self.probability).detach()
        silenced = torch.where(opened, 0.0, self.probability).detach()
        source = self.probability
        if not transforms.constant(self.amount):
            source = torch.where(opened, self.amount, self.probability)
        lever = source - source.detach()
        if self.margin is not None:  # the gate learns otherwise
            lever = lever.detach()
        return self.opened, weight, silenced, lever


class Pending(NamedTuple):
    """The map of the last solve in training, for penalties on it.

    Attributes:
        f: of (state, *context).
        state: where it was solved, without a graph.
        context: with its graph.
        rows: (B,) bool, the rows that count.
        autocast: the dtype of the autocast it ran under, or None.
    """

    f: Callable[..., Any]
    state: Any
    context: tuple[Tensor, ...]
    rows: Tensor
    autocast: torch.dtype | None

    @staticmethod
    def now(f: Callable[..., Any], state: Any, context: tuple[Tensor, ...], rows: Tensor) -> Pending:
        """Under the present autocast setting."""
        device = rows.device.type
        on = torch.is_autocast_enabled(device)
        return Pending(f, state, context, rows, torch.get_autocast_dtype(device) if on else None)

    def taken(self, rows: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """State and context of some rows."""
        context = tuple(c.index_select(0, rows) for c in self.context)
        if isinstance(self.state, Tensor):
            return self.state.index_select(0, rows), context
        return tuple(s.index_select(0, rows) for s in self.state), context


class Part(Protocol):
    """A wormhole as a solve sees it; see :class:`~twnn_plugin.blocks.feedback.Feedback`."""

    span: str
    mode: str
    training: bool
    message: Message
    gate: Gate
    settings: SolveSettings
    aids: Aids
    companion: Companion | None
    shapes: tuple[Any, ...] | None
    pending: Pending | None

    @property
    def last(self) -> SpanRecord | None:
        """The record of the last pass."""
        ...

    @last.setter
    def last(self, record: SpanRecord | None) -> None: ...

    def choose(self, out: Tensor) -> Choice:
        """Who is iterated, from the (B, ...) open-loop output of the source."""
        ...

    def glance(self, out: Tensor) -> Callable[[], Tensor] | None:
        """In eval mode, what gives the probabilities if no row of ``out`` opens; None: call ``choose``."""
        ...

    def rested(self, probability: Callable[[], Tensor], group: str | None) -> None:
        """Called in place of :meth:`solved` after a pass in which no row was open."""
        ...

    def solved(self, training: bool) -> None:
        """Called after each pass, with ``last`` set."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
