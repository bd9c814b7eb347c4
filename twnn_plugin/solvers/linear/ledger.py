"""What is known of every row of a linear solve, and the solutions of the finished ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Status
from ..base import Outcome

__all__ = ["Ledger"]


class Ledger:
    """What is known of every row, and the solutions of the finished ones.

    Args:
        rhs: (B, D) right-hand sides.
        unit: (B,) factors by which the rows were divided.
        scale: (B,) what residuals are relative to, of the divided rows.
    """

    def __init__(self, rhs: Tensor, unit: Tensor, scale: Tensor):
        batch = rhs.shape[0]
        self.unfinished = batch
        self.rows = torch.arange(batch, device=rhs.device)  # original index of each present row
        self.alive: Tensor | None = None  # (b,) present rows that are not finished; None: all
        self.unit = unit
        self.scale = scale.clamp_min(torch.finfo(rhs.dtype).tiny)
        self.value = torch.zeros_like(rhs)
        self.status = torch.full((batch,), int(Status.max_iter), device=rhs.device)
        self.steps = torch.zeros_like(self.status)
        self.residual = torch.full_like(unit, float("nan"))

    def finish(self, leaving: Tensor, k: int, code: Tensor, size: Tensor, value: Tensor) -> None:
        """Write down the rows of the (b,) mask ``leaving``, after ``k`` products."""
        local = torch.nonzero(leaving).flatten()
        self._write(local, k, size, value)
        self.status[self.rows[local]] = code[local]
        self.alive = ~leaving if self.alive is None else self.alive & ~leaving
        self.unfinished -= local.numel()

    def exhaust(self, k: int, size: Tensor, value: Tensor) -> None:
        """Write down the rows for which the products ran out."""
        alive = self.alive
        local = (
            torch.arange(size.shape[0], device=size.device) if alive is None else alive.nonzero().flatten()
        )
        self._write(local, k, size, value)
        self.unfinished = 0

    def _write(self, local: Tensor, k: int, size: Tensor, value: Tensor) -> None:
        rows = self.rows[local]
        self.value[rows] = value[local] * self.unit[rows][:, None]
        self.residual[rows] = size[local] / self.scale[rows]
        self.steps[rows] = k

    def compact(self) -> Tensor:
        """Drop the finished rows; the indices of those that stay."""
        assert self.alive is not None
        keep = torch.nonzero(self.alive).flatten()
        self.rows, self.alive = self.rows[keep], None
        return keep

    def outcome(self) -> Outcome:
        """The whole batch, in its order."""
        return Outcome(self.value, self.status, self.steps, self.residual)
