"""Sending the open-loop value of every sample through the rest of a network, beside the settled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Companion"]

Solve = Callable[[int | None], tuple[Tensor, ...]]


class Companion:
    """Doubles the batch behind a model's first wormhole: settled rows first, then the open-loop ones.

    What lies behind the span so computes both answers in one pass; further wormholes leave the second half
    alone. All wormholes of a model share one.

    Attributes:
        rows: B while the batch is 2 B, else None.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.rows: int | None = None

    def begin(self, wanted: bool) -> None:
        """A pass through the model begins."""
        self.wanted, self.rows = wanted, None

    def beside(self, outs: Sequence[Tensor], solve: Solve) -> tuple[Tensor, ...]:
        """What ``solve`` makes of the rows that it may iterate, and the open-loop rows behind them.

        Args:
            outs: the open-loop outputs, of B rows, or of 2 B once the batch is doubled.
            solve: of the number of rows to take, from the front; None: all.
        """
        if not self.wanted:
            return solve(None)
        if self.rows is None:
            settled, self.rows = solve(None), outs[0].shape[0]
            return tuple(torch.cat([v, out]) for v, out in zip(settled, outs, strict=True))
        rows = self.rows
        return tuple(torch.cat([v, out[rows:]]) for v, out in zip(solve(rows), outs, strict=True))
