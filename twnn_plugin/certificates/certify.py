"""One call that checks a solution: what was measured, what follows, what to worry about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError, nearest
from ..solvers.measure import EPS, measure
from ..types import Solution, State, Status
from .gradient import Cotangent, GradientError, amplification, gradient_error_of
from .linear import Jacobian, check_generator
from .spectrum import Estimate, lipschitz_of, radius_of

__all__ = ["Certificate", "certify"]

_LARGE = 0.1  # a relative error of the gradient that deserves a warning


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` found; all (B,). ``str()`` gives a table.

    Attributes:
        residual: measured anew, ``||f(z) - z||`` as ``stop`` and ``norm`` say.
        radius: spectral radius of df/dz.
        lipschitz: largest singular value of df/dz; of a state of several parts that with each part in units
            of its rms, so that it does not depend on what they are measured in.
        state_error: ``||(I - J)^-1 (f(z) - z)||``, an estimate of ``||z - z*||`` in l2, absolute.
        state_bound: ``||f(z) - z|| / (1 - lipschitz)`` in l2, inf where lipschitz >= 1; of several parts
            that in their units, times the largest of them. Both say little about a part whose numbers are
            small beside another's.
        gradient: the estimated relative error of the implicit gradient, see
            :class:`~twnn_plugin.certificates.GradientError`.
        warnings: sentences; empty if there is nothing to worry about.
    """

    residual: Tensor
    radius: Estimate
    lipschitz: Estimate
    state_error: Tensor
    state_bound: Tensor
    gradient: GradientError
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        figures = (
            ("residual", self.residual),
            ("spectral radius", self.radius.value),
            ("Lipschitz constant", self.lipschitz.value),
            ("state error", self.state_error),
            ("state error, bound", self.state_bound),
            ("gradient error, state", self.gradient.state),
            ("gradient error, adjoint", self.gradient.adjoint),
            ("gradient error, weights", self.gradient.weights[None]),
        )
        rows = [("figure", "median", "largest", "in row"), *(_line(name, f) for name, f in figures)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes = [f"- {sentence}" for sentence in self.warnings] or ["Nothing to warn about."]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def certify(
    f: Callable[..., State],
    solution: Solution,
    *context: Tensor,
    stop: str = "rel",
    norm: str = "l2",
    cotangent: Cotangent | None = None,
    iterations: int = 40,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Check a solution independently of the solver that made it.

    Costs up to ``6 * iterations`` Jacobian products: meant for looking into a model, not for every
    training step. ``f`` must be the function, and the context the tensors, that ``fix`` was given,
    in the same mode (dropout off).

    Args:
        f: as given to ``fix``.
        solution: what ``fix`` returned. If ``backward`` ran, its report is taken into account.
        *context: as given to ``fix``.
        stop: as given to ``fix``, for ``residual``.
        norm: as given to ``fix``, for ``residual``.
        cotangent: see :func:`~twnn_plugin.certificates.gradient_error`.
        iterations: of each linear solve and spectral estimate, at most; >= 1.
        generator: of random directions; ``None``: a fixed seed, so that calls are repeatable.

    Returns:
        A :class:`Certificate`.

    Raises:
        OptionError: an option is out of range, or ``solution`` is no solution.
        MapError: ``f``, the context or the cotangent does not fit the state.
    """
    if not isinstance(solution, Solution):
        raise OptionError(f"certify takes what fix returned, a Solution; got a {type(solution).__name__}.")
    for name, value, known in (("stop", stop, ("rel", "abs")), ("norm", norm, ("l2", "max"))):
        if value not in known:
            raise OptionError(f"{name} must be one of {known}; got {value!r}.{nearest(str(value), known)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations must be a whole number, at least 1; got {iterations!r}.")
    check_generator(generator)
    jacobian = Jacobian(f, solution.value, context)
    r = jacobian.residual
    if r.shape[1]:
        change, size = measure(r, jacobian.fz.detach(), norm, jacobian.layout.parts(stop))
    else:
        change = size = r.new_zeros(r.shape[0])
    residual = change / (size + EPS) if stop == "rel" else change
    like, push, pull = jacobian.z.detach(), jacobian.push_in_units, jacobian.pull_in_units
    radius = radius_of(pull, like, iterations, 1e-3, generator)
    lipschitz = lipschitz_of(push, pull, like, iterations, 1e-3, generator)
    length = _length(jacobian, r)
    bound = torch.where(lipschitz.value < 1, length / (1 - lipschitz.value), float("inf"))
    step = jacobian.solve(r, iterations)
    report = solution.adjoint
    gradient = gradient_error_of(
        f,
        jacobian,
        step,
        amplification(lipschitz.value, radius.value),
        cotangent,
        0.0 if report is None else report.residual.detach(),
        iterations,
        generator,
    )
    bound = torch.where(lipschitz.value.isnan(), float("nan"), bound)
    warnings = _warnings(solution, residual, radius, lipschitz, gradient)
    error = torch.linalg.vector_norm(step, dim=1)
    return Certificate(residual, radius, lipschitz, error, bound, gradient, warnings)


def _length(jacobian: Jacobian, r: Tensor) -> Tensor:
    """(B,) the l2 norm of residuals; where a state has parts, that of the longest row as long in units."""
    length = torch.linalg.vector_norm(jacobian.per_unit(r), dim=1)
    if jacobian.units is None or not r.shape[1]:
        return length
    return length * jacobian.units.amax(dim=1)


def _warnings(
    solution: Solution, residual: Tensor, radius: Estimate, lipschitz: Estimate, gradient: GradientError
) -> tuple[str, ...]:
    """What is worth a sentence, the gravest first."""
    found: list[str] = []

    def note(rows: Tensor, sentence: str) -> None:
        if bool(rows.any()):
            found.append(f"{_rows(rows)}: {sentence}")

    if not bool(solution.converged.all()):
        found.extend(solution.describe().splitlines())
    good = solution.converged
    told = solution.residual.detach()
    floor = 16 * torch.finfo(residual.dtype).eps
    note(
        good & (residual > 1.5 * told + floor),
        "the residual is larger than the solver reported. f is not the function that was solved (dropout, "
        "other context, stop or norm), or it is not deterministic.",
    )
    note(
        radius.value >= 1,
        "the spectral radius is not below 1: plain iteration moves away from this solution.",
    )
    note(
        (radius.value < 1) & (radius.value + radius.error >= 1) & (lipschitz.value + lipschitz.error >= 1),
        "the estimate of the spectral radius has not settled and may reach 1: raise iterations.",
    )
    note(
        (lipschitz.value + lipschitz.error >= 1) & (radius.value < 1),
        "the Lipschitz constant is not safely below 1: iteration converges in the end, but may move away "
        "first, and the errors of state and gradient are estimates, not bounds.",
    )
    report = solution.adjoint
    if report is None:
        found.append("No backward solve has run: the gradient error has no adjoint part yet.")
    elif not report.exact:
        found.append(
            f"Adjoint {report.name!r} is an approximation; these figures do not hold what that costs."
        )
    else:
        note(report.status != int(Status.converged), "the backward solve did not converge.")
    way_out = "may be more than 10 % off: lower tol, here or of the adjoint."
    note(gradient.total > _LARGE, f"the gradient {way_out}")
    if bool(gradient.weights > _LARGE):
        found.append(f"The gradient of the weights {way_out}")
    return tuple(found)


def _rows(mask: Tensor) -> str:
    rows = torch.nonzero(mask).flatten().tolist()
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"{len(rows)} row(s) [{shown}]"


def _line(name: str, figure: Tensor) -> tuple[str, str, str, str]:
    known = torch.where(figure.isnan(), float("-inf"), figure)
    if not bool((~figure.isnan()).any()):
        return name, "-", "-", "-"
    row = int(known.argmax())
    where = str(row) if figure.numel() > 1 else "-"
    return name, f"{float(figure.nanmedian()):.2e}", f"{float(figure[row]):.2e}", where
