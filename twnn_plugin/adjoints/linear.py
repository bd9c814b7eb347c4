"""The linear equation of an adjoint, ``u = A u + g``, by any solver of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import solvers
from ..errors import OptionError, UnknownNameError, nearest
from ..solvers import Control, Outcome, Solver, linear
from ..solvers.linear import LinearSolver
from ..solvers.measure import kinds
from ..types import Status

__all__ = [
    "ULPS",
    "LinearSettings",
    "Products",
    "in_units",
    "known",
    "named",
    "solve_linear",
    "spread",
    "units_of",
]

_MARGIN = 1e3  # between what is squared and the ends of a dtype's range
ULPS = 4  # a tolerance below this many roundings cannot be met


def known() -> list[str]:
    """Names of everything that solves the linear equation, linear solvers first."""
    names = linear.registry.names()
    return [*names, *(name for name in solvers.registry.names() if name not in names)]


def named(solver: str | Solver | LinearSolver) -> Solver | LinearSolver:
    """A solver of the linear equation by name or instance; a linear one where a name stands for both.

    Raises:
        UnknownNameError: neither a linear solver nor a solver has that name.
        OptionError: not a name or an instance of either.
    """
    if isinstance(solver, (Solver, LinearSolver)):
        return solver
    if not isinstance(solver, str):
        raise OptionError(
            f"An adjoint's solver is a name, tw.solver(...) or tw.linear_solver(...); got {solver!r}."
        )
    names = known()
    if solver not in names:
        raise UnknownNameError(
            f"No solver {solver!r} for the adjoint equation.{nearest(solver, names)} There are: "
            f"{', '.join(names)}."
        )
    return (
        linear.registry.make(solver) if solver in linear.registry.names() else solvers.registry.make(solver)
    )


@dataclass(frozen=True)
class LinearSettings:
    """How the linear equations of one adjoint are solved.

    Attributes:
        solver: an instance.
        tol: relative to ``||g||``, row by row.
        max_iter: products per row at most.
        coupled: rows influence each other.
    """

    solver: Solver | LinearSolver
    tol: float
    max_iter: int
    coupled: bool = False


class Products:
    """``A`` by its products, and ``u -> A u + g``: a problem for both kinds of solvers.

    Args:
        product: of a (b, D) matrix.
        g: (b, D).
        eps: relative rounding error of a product.
        renew: given the indices of the rows to go on with, their ``product``; ``None``: no row leaves.
    """

    leave_share = 0.3  # preparing the products of fewer rows costs some three products of few rows

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        g: Tensor,
        eps: float,
        renew: Callable[[Tensor], Callable[[Tensor], Tensor]] | None,
    ):
        self._product, self.g, self.eps, self._renew = product, g, eps, renew
        self.size = g.shape[0]
        self.evaluations = 0
        self.can_leave = renew is not None

    def product(self, u: Tensor) -> Tensor:
        self.evaluations += self.size
        return self._product(u)

    def evaluate(self, z: Tensor) -> Tensor:
        return self.product(z) + self.g

    def in_units(self, units: Tensor) -> Products:
        """The equation of ``units * u``, for (b, D) units."""
        renew, kept = self._renew, units

        def renewed(rows: Tensor) -> Callable[[Tensor], Tensor]:
            nonlocal kept
            assert renew is not None
            kept = kept[rows]
            return in_units(renew(rows), kept)

        product = in_units(self._product, units)
        return Products(product, units * self.g, self.eps, None if renew is None else renewed)

    def keep(self, rows: Tensor) -> None:
        assert self._renew is not None
        self.g, self.size = self.g[rows], rows.numel()
        self._product = self._renew(rows)


def in_units(product: Callable[[Tensor], Tensor], units: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``A`` in other units: ``w -> units * A (w / units)``, row by row."""
    if units is None:
        return product
    return lambda w: units * product(w / units)


def units_of(z: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """(b, D) the rms of each part of the states: what a cotangent must be multiplied by to be compared.

    A cotangent has the inverse unit of its state. Where a state has parts of different size, one norm over
    its cotangent would see one of them only. ``None`` for a state of one part.
    """
    if len(sizes) == 1:
        return None
    sized = []
    for part, size in zip(z.split(list(sizes), dim=1), sizes, strict=True):
        rms = torch.linalg.vector_norm(part, dim=1, keepdim=True) / max(size, 1) ** 0.5
        # Of a part too large for its norm there is none, and infinity would make NaN of finite cotangents.
        sound = (rms > 0) & torch.isfinite(rms)
        sized.append(torch.where(sound, rms, 1.0).expand(-1, size))
    return torch.cat(sized, dim=1)


def solve_linear(problem: Products, settings: LinearSettings, guess: Tensor | None = None) -> Outcome:
    """Solve ``u = A u + g`` row by row; a row that fails gets ``u = g``.

    Args:
        problem: the equation.
        settings: the solver and when it stops.
        guess: (b, D) a solution of a similar equation; used in rows where it is nearer than ``u = g`` is
            taken to be.
    """
    g = problem.g
    scale = torch.linalg.vector_norm(g, dim=1)
    tol = max(settings.tol, ULPS * torch.finfo(g.dtype).eps)
    unit = _unit(g, scale, tol, settings.coupled)
    if unit is not None:  # the equation is linear: what cannot be squared is solved for in other units
        problem.g = g / unit
        solved = solve_linear(problem, settings, None if guess is None else guess / unit)
        return replace(solved, value=solved.value * unit)
    if settings.coupled and scale.numel():  # one system: a row without a gradient has no size of its own
        scale = (torch.linalg.vector_norm(scale) / scale.numel() ** 0.5).expand_as(scale).contiguous()
    control = Control(tol=tol, max_iter=settings.max_iter, scale=scale, coupled=settings.coupled)
    if guess is not None and control.max_iter > 1:
        return _from_guess(problem, settings, control, guess)
    return _checked(_solve(settings.solver, problem, g, control), g)


def _unit(g: Tensor, scale: Tensor, tol: float, coupled: bool) -> Tensor | None:
    """(b, 1) powers of two near the largest entries, where squares of some row's would leave the range.

    Coupled rows have one unit: their equation is one, and what is scaled row by row solves another.
    """
    limits = torch.finfo(g.dtype)
    if not scale.numel():
        return None
    least, most = (x.item() for x in scale.aminmax())  # NaN if there is one
    if least > _MARGIN * limits.tiny**0.5 / tol and most < limits.max**0.5 / _MARGIN**2:
        return None
    largest = g.abs().amax(dim=1, keepdim=True) if g.shape[1] else g.new_zeros(g.shape[0], 1)
    if coupled:
        largest = torch.where(torch.isfinite(largest), largest, 0.0).amax().expand_as(largest)
    sound = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(sound, largest, 1.0)).exponent - 1
    unit = torch.ldexp(torch.ones_like(largest), exponent)
    return None if bool((unit == 1).all()) else unit


def _solve(solver: Solver | LinearSolver, problem: Products, g: Tensor, control: Control) -> Outcome:
    if isinstance(solver, LinearSolver):
        return solver.solve(problem, g, control)
    return solvers.solve(solver, problem, g, control)


def _from_guess(problem: Products, settings: LinearSettings, control: Control, guess: Tensor) -> Outcome:
    # The correction d to the guess solves d = A d + (g + A guess - guess).
    g = problem.g
    rest = problem.evaluate(guess) - guess
    near = torch.linalg.vector_norm(rest, dim=1) < 0.5 * torch.linalg.vector_norm(g, dim=1)
    if control.coupled:  # all rows begin at the guess, or none: the rest is that of all of it
        near = (torch.linalg.vector_norm(rest) < 0.5 * torch.linalg.vector_norm(g)).expand_as(near)
    start = torch.where(near[:, None], guess, 0.0)
    right = torch.where(near[:, None], rest, g)
    problem.g = right  # of the rows that are still there, while it is solved
    control = replace(control, max_iter=control.max_iter - 1)
    outcome = _checked(_solve(settings.solver, problem, right, control), right)
    failed = _failed(outcome.status)[:, None]
    return replace(outcome, value=torch.where(failed, g, start + outcome.value), steps=outcome.steps + 1)


def _failed(status: Tensor) -> Tensor:
    return (status == int(Status.diverged)) | (status == int(Status.non_finite))


def _checked(outcome: Outcome, g: Tensor) -> Outcome:
    if not kinds(outcome.status) & {int(Status.diverged), int(Status.non_finite)}:
        return outcome
    return replace(outcome, value=torch.where(_failed(outcome.status)[:, None], g, outcome.value))


def spread(outcome: Outcome, rows: Tensor, into: Sequence[Tensor]) -> Outcome:
    """The outcome of some rows put into (value, status, steps, residual) of the whole batch."""
    value, status, steps, residual = into
    return Outcome(
        value.index_copy(0, rows, outcome.value),
        status.index_copy(0, rows, outcome.status),
        steps.index_copy(0, rows, outcome.steps),
        residual.index_copy(0, rows, outcome.residual.to(residual.dtype)),
    )
