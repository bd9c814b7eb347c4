"""The AD transforms of the iterate-to-fixed-point operator, as the paper writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..solvers import Solver
from ..solvers.picard import Picard
from .implicit import Implicit

__all__ = ["ADFixedPoint"]


@dataclass(frozen=True)
class ADFixedPoint(Implicit):
    """The AD transforms of ``fix``: derivatives iterated to a fixed point like the value.

    Equations 6 to 9 of Habiba & Pearlmutter (2021), after Pearlmutter & Siskind. Reverse: the cotangent
    is iterated, ``u <- J^T u + g``, until it settles; then u is pulled back through ``f``. Forward:
    primal and tangent are iterated together from the start, ``(z, v) <- (f(z), J v + r)``, until both
    settle; as the primal part of that is plain iteration, use ``solver="ad_fixed_point"`` with it.
    Both are exact to the tolerance and need a contraction; closed under differentiation as
    ``implicit`` is, whose Krylov methods need fewer products where ``f`` contracts slowly.

    Args:
        solver: of the reverse transform, as for ``implicit``; ``None``: plain iteration.
        tol: tolerance relative to ``||g||``, row by row; ``None``: that of the forward solve, 1e-3 at most
            where that is absolute.
        max_iter: products with the Jacobian per row; ``None``: as many as the forward solve had, but
            at least 20.
        warm_start: as for ``implicit``.
    """

    name: ClassVar[str] = "ad_fixed_point"
    joint: ClassVar[bool] = True
    default_solver: ClassVar[str | Solver] = Picard()
