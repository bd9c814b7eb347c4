"""Reports of adjoints that solve no equation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import Outcome
from ..types import AdjointReport, Status

__all__ = ["told"]


def told(name: str, outcome: Outcome, rows: Tensor | None, steps: int) -> AdjointReport:
    """What a gradient of so many steps tells: nothing of its error, and which rows had one.

    Args:
        name: of the adjoint.
        outcome: of the forward solve.
        rows: (b,) indices of the rows that were not left out; None: all.
        steps: products a row.
    """
    taken = torch.full_like(outcome.steps, steps)
    status = torch.full_like(outcome.status, int(Status.converged))
    count = taken.numel() if rows is None else rows.numel()
    if rows is not None:
        left_out = torch.ones_like(status, dtype=torch.bool).index_fill(0, rows, False)
        status = torch.where(left_out, int(Status.non_finite), status)
        taken = torch.where(left_out, 0, taken)
    unknown = torch.full_like(outcome.residual, float("nan"))
    return AdjointReport(name, False, status, taken, unknown, steps * count)
