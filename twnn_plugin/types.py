"""What a solve returns: statuses and the solution object."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["AdjointReport", "Iteration", "PolicyView", "Solution", "State", "Status", "describe"]

State = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""A state: one tensor, or a tuple or dict of tensors; the batch is the first axis of each."""


class Status(enum.IntEnum):
    """How the solve of one row ended."""

    converged = 0
    max_iter = 1
    diverged = 2
    non_finite = 3
    stagnated = 4

    @property
    def sentence(self) -> str:
        """What happened and what to change."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.converged: "The residual is within the tolerance.",
    Status.max_iter: (
        "The iterations ran out before the tolerance was met: raise max_iter or tol, or use "
        "solver='anderson'."
    ),
    Status.diverged: (
        "The residual grew without bound: f is not a contraction here. Scale f down (damping, spectral "
        "or Jacobian regularisation) or use solver='anderson'."
    ),
    Status.non_finite: (
        "f returned NaN or inf for this row, or a state too large for its norm: look for non-finite input or "
        "an overflow in f."
    ),
    Status.stagnated: (
        "The residual stopped at the rounding floor of the dtype above the tolerance, or rows that influence "
        "each other were solved for apart: raise tol, use a wider dtype, or pass coupled=True."
    ),
}


_RUNS = 24  # of rows that are named in one message


def describe(statuses: Tensor) -> str:
    """One line for each way in which rows failed: how many, which, and what to do about it.

    Args:
        statuses: (B,) integers of :class:`Status`.
    """
    lines = []
    for status in list(Status)[1:]:
        rows = torch.nonzero(statuses == int(status)).flatten().tolist()
        if rows:
            lines.append(f"{status.name}: {len(rows)} row(s) [{_shown(rows)}]. {status.sentence}")
    return "\n".join(lines) or f"All {statuses.numel()} rows converged."


def _shown(rows: Sequence[int]) -> str:
    """``0, 1, 5``, and of more than a few ``0-11, 14``."""
    if len(rows) <= 8:
        return ", ".join(map(str, rows))
    apart = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    runs = [(rows[i], rows[j - 1]) for i, j in pairwise([0, *apart, len(rows)])]
    named = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_RUNS]]
    return ", ".join(named) + (", ..." if len(runs) > _RUNS else "")


@dataclass
class AdjointReport:
    """How the backward solve ended, row by row.

    Attributes:
        name: the adjoint's registered name.
        exact: whether the gradient is that of the fixed point (up to the tolerance) or an
            approximation of it.
        status: (B,) integers of :class:`Status`.
        steps: (B,) vector-Jacobian products spent on the row.
        residual: (B,) ``||J^T u + g - u|| / ||g||`` at the end; for a state of several tensors with each part
            of u and g multiplied by the rms of that part of the state, so that units do not matter.
        evaluations: vector-Jacobian products in all, counted in rows.
    """

    name: str
    exact: bool
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: int


@dataclass
class Iteration:
    """What a callback sees after every evaluation of ``f``.

    Attributes:
        step: evaluations so far, from 1.
        rows: (b,) indices, in the original batch, of the rows that were evaluated and are not
            finished yet.
        residual: (b,) their residuals, measured as ``stop`` and ``norm`` say.
        evaluations: rows evaluated so far in all.
        value: (b, D) their states, flattened.
    """

    step: int
    rows: Tensor
    residual: Tensor
    evaluations: int
    value: Tensor


@dataclass
class Solution:
    """The result of :func:`twnn_plugin.fix`.

    Attributes:
        value: the state, of the structure of ``z0``. For a converged row it is a state whose
            residual was measured and is within the tolerance; for a row that ran out of
            iterations, the newest state.
        status: (B,) integers of :class:`Status`.
        steps: (B,) evaluations of ``f`` spent on the row.
        residual: (B,) the last measured residual: ``||f(z) - z||`` for ``stop="abs"``, divided by
            ``||f(z)||`` for ``stop="rel"``; of a state of several tensors the largest of theirs.
        evaluations: calls of ``f`` in all, counted in rows: the sum over iterations of the rows that ran, and
            where gradients are recorded the evaluations that attach them (one of all rows with ``implicit``,
            ``ad_fixed_point`` and ``one_step``, as many as its steps with ``phantom``).
    """

    value: Any
    status: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: int
    # A shared box rather than a field that the backward pass sets: the autograd graph of ``value``
    # must not point back at the solution, or the two would keep each other alive for ever.
    reports: list[AdjointReport] = field(default_factory=list, repr=False)

    @property
    def adjoint(self) -> AdjointReport | None:
        """The report of the newest backward solve once one ran, else ``None``."""
        return self.reports[-1] if self.reports else None

    @property
    def converged(self) -> Tensor:
        """(B,) bool, true where the row converged."""
        return self.status == int(Status.converged)

    def describe(self) -> str:
        """One line for each way in which rows failed: how many, which, and what to do about it."""
        return describe(self.status)


@dataclass(frozen=True)
class PolicyView:
    """What a policy sees of one span before it is iterated. It knows nothing of the model.

    Attributes:
        span: the span's name, such as ``"layer4->layer3"``.
        features: (B, C) pooled activations of the span's open-loop output, detached.
        probability: (B,) the gate's probability, detached.
        open: (B,) bool, what the gate would do.
    """

    span: str
    features: Tensor
    probability: Tensor
    open: Tensor
