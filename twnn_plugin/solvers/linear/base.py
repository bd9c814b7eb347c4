"""What a linear solver is: a way to solve ``u = J^T u + g`` for every row by products with ``J^T``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from ...errors import OptionError
from ..base import Control, Outcome

__all__ = ["LinearProblem", "LinearSolver", "check_count"]


class LinearProblem(Protocol):
    """The matrices ``J^T`` of the rows that are still being solved, known by their products.

    Attributes:
        size: rows now in the batch, b.
        evaluations: products made so far, counted in rows.
        can_leave: whether rows may leave the batch.
        leave_share: rows leave when the share of unfinished rows falls below this.
        eps: relative rounding error of one product: ``torch.finfo(dtype).eps`` of the dtype in which it
            is computed (under autocast not that of its result). Says when a residual that was updated,
            not measured, cannot be trusted.
    """

    size: int
    evaluations: int
    can_leave: bool
    leave_share: float
    eps: float

    def product(self, u: Tensor) -> Tensor:
        """``J^T u`` for a (b, D) matrix; counted in ``evaluations``."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices into the present batch) only."""
        ...


class LinearSolver(ABC):
    """A way to solve ``(I - J^T) u = g``, each row of the batch its own system.

    Write it as a frozen dataclass whose fields are its options. Methods that make one product an
    iteration derive from :class:`~twnn_plugin.solvers.linear.loop.Krylov` and leave the loop to it.
    """

    @abstractmethod
    def solve(self, problem: LinearProblem, rhs: Tensor, control: Control) -> Outcome:
        """Solve from ``u = g``; no derivative of the solve is recorded.

        Args:
            problem: the products.
            rhs: (B, D) right-hand sides g, float32 or float64.
            control: a row has converged when ``||g + J^T u - u|| <= tol * scale``, ``scale`` being
                ``control.scale`` or, without it, ``||g||``; ``max_iter`` bounds the products of a row.
                With ``coupled`` the rows are one system and finish together.

        Returns:
            The solutions (B, D); status; products spent on each row; residuals relative to ``scale``. A
            row is reported converged only if its residual was measured, or updated over so few steps
            that rounding cannot have carried it over the tolerance. A row that failed has the newest
            solution, or u = g if that has the smaller residual.
        """


def check_count(solver: str, option: str, value: object) -> None:
    """Raise :class:`~twnn_plugin.errors.OptionError` unless ``value`` is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"Option {option} of linear solver '{solver}' must be a whole number, at least 1; got {value!r}."
        )
