"""Sending the open-loop value of every sample through the rest of a network, beside the settled one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .record import SpanRecord

__all__ = ["Companion", "PerThread"]

Solve = Callable[[int | None, Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""``solve(rows, beside) -> (values, beside)``: what becomes of the first rows, None being all of them, and of
the open-loop rows that go on beside them."""


class PerThread(threading.local):
    """Attributes that each thread has a value of its own of: two passes at once do not meet.

    A thread finds what the constructor sets. Copies and pickles begin anew.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Companion(PerThread):
    """Doubles the batch behind a model's first wormhole: settled rows first, then the open-loop ones.

    What lies behind the span so computes both answers in one pass; further wormholes leave the second half
    alone. All wormholes of a model share one. Between the wormholes and the closed head it also says who was
    settled in this thread's pass, whatever other threads do.

    Attributes:
        rows: B while the batch is 2 B, else None.
        settled: for each span, the rows of its last pass, and (B,) bool, those that were iterated and did not
            fall back; None: nobody was.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.rows: int | None = None
        self.settled: dict[str, tuple[int, Tensor | None]] = {}

    def begin(self, wanted: bool) -> None:
        """A pass through the model begins."""
        self.wanted, self.rows = wanted, None

    def note(self, record: SpanRecord) -> None:
        """A wormhole has been solved for."""
        self.settled[record.span] = record.open.shape[0], record.open & ~record.fallback

    def doubled(self, outs: Sequence[Tensor], solve: Solve) -> tuple[Tensor, ...]:
        """What ``solve`` makes of the rows that it may iterate, and the open-loop rows behind them.

        Args:
            outs: the open-loop outputs, of B rows, or of 2 B once the batch is doubled.
            solve: what settles the rows.
        """
        rows = self.rows
        settled, beside = solve(rows, outs if rows is None else [out[rows:] for out in outs])
        if rows is None:
            self.rows = outs[0].shape[0]
        return tuple(torch.cat(pair) for pair in zip(settled, beside, strict=True))
