"""How fast a map contracts: spectral radius, Lipschitz constant, rate of an observed trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..solvers.base import is_number
from ..types import State
from .linear import Jacobian, Krylov, Product, check_generator, probe

__all__ = [
    "Estimate",
    "contraction_rate",
    "dominant",
    "lipschitz_of",
    "observed_rate",
    "radius_of",
    "spectral_radius",
]

_MEMORY = 40  # directions kept at a time; beyond them the method restarts
_LOOK = 5  # products between looks whether all rows are accurate enough
_FILTER = 60  # power of the projected operator that a restart starts from


class Estimate(NamedTuple):
    """A figure per row, and how far it has settled.

    Attributes:
        value: (B,) the estimate; NaN in rows with NaN or inf.
        error: (B,) residual of the eigenvalue equation it comes from. For a symmetric or normal
            operator an eigenvalue lies within this distance; otherwise it is a guide.
        products: Jacobian products spent on each row.
    """

    value: Tensor
    error: Tensor
    products: int


def spectral_radius(
    f: Callable[..., State],
    z: State,
    *context: Tensor,
    iterations: int = 40,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Largest modulus among the eigenvalues of ``df/dz`` at ``z``, row by row, complex ones included.

    Plain iteration converges near a fixed point where, and only where, it is below 1; the number is
    its asymptotic rate. Taken from the Ritz values of Arnoldi's method (Saad 2011, section 6.2), so
    a complex pair is seen as such: a rotation by any angle, scaled by 0.9, gives 0.9. Power iteration
    on the Rayleigh quotient gives 0.9 times the cosine of the angle. Where many eigenvalues share the
    largest modulus the estimate comes from below, and ``error`` stays large. The units of a state's parts
    make no difference: they are worked with as multiples of their rms in ``z``.

    Args:
        f: ``f(z, *context)``, rows independent.
        z: state (B, ...), tensor, tuple or dict; usually ``solution.value``.
        *context: tensors (B, ...).
        iterations: vector-Jacobian products per row at most, >= 1.
        tol: stop early when the error of every row is below ``tol`` times its value. >= 0.
        generator: of the first direction; ``None``: a fixed seed, so that calls are repeatable.

    Returns:
        An :class:`Estimate` of (B,) tensors.

    Raises:
        OptionError: an option is out of range.
        MapError: ``f`` or the context does not fit the state.
    """
    _check(iterations, tol, generator)
    jacobian = Jacobian(f, z, context)
    return radius_of(jacobian.pull_in_units, jacobian.z.detach(), iterations, tol, generator)


def contraction_rate(
    f: Callable[..., State],
    z: State,
    *context: Tensor,
    iterations: int = 40,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Largest singular value of ``df/dz`` at ``z``, row by row: the local Lipschitz constant in l2.

    Below 1 it certifies a contraction near ``z``, with ``||z - z*|| <= ||f(z) - z|| / (1 - rate)``
    (Banach) where the Jacobian does not vary; it is never below the spectral radius, and for
    a non-normal Jacobian it may exceed 1 where iteration converges. The root of the largest eigenvalue of
    ``J^T J``, by Lanczos' method with full orthogonalisation: it comes from below, so add ``error``
    to be on the safe side. For the rate at which a solve did converge see :func:`observed_rate`.

    A property of the norm, too: of a state whose parts have different units it is that of the plain row, and
    changes with the units. :func:`~twnn_plugin.certify` has it with every part in units of its rms.

    Args:
        f: as in :func:`spectral_radius`; must be twice differentiable in reverse mode.
        z: as in :func:`spectral_radius`.
        *context: as in :func:`spectral_radius`.
        iterations: pairs of products ``J v``, ``J^T u`` per row at most, >= 1.
        tol: as in :func:`spectral_radius`.
        generator: as in :func:`spectral_radius`.

    Returns:
        An :class:`Estimate` of (B,) tensors.

    Raises:
        OptionError: an option is out of range.
        MapError: ``f`` or the context does not fit the state.
    """
    _check(iterations, tol, generator)
    jacobian = Jacobian(f, z, context)
    return lipschitz_of(jacobian.push, jacobian.pull, jacobian.z.detach(), iterations, tol, generator)


def observed_rate(residual: Tensor) -> Tensor:
    """Factor by which a solve's residual shrank per step, row by row, from a recorded trace.

    ``exp`` of the slope of a straight line through the logarithms of the second half of a row's
    residuals: the first steps belong to the start, not to the rate. It describes the solver that ran,
    so an accelerated solve beats the map's own rate.

    Args:
        residual: (B, K) residuals, NaN where a row was finished: :attr:`tw.Trace.residual`.

    Returns:
        (B,) rates, in the dtype of ``residual``; NaN for rows with fewer than two positive residuals.

    Raises:
        OptionError: not a (B, K) floating-point tensor.
    """
    tensor = isinstance(residual, Tensor)
    if not tensor or residual.dim() != 2 or not residual.is_floating_point():
        got = f"{tuple(residual.shape)} of {residual.dtype}" if tensor else f"a {type(residual).__name__}"
        raise OptionError(
            f"observed_rate takes a (B, K) floating-point trace, such as Trace().residual; got {got}."
        )
    usable = torch.isfinite(residual) & (residual > 0)
    order = usable.cumsum(dim=1)
    count = usable.sum(dim=1, keepdim=True)
    late = usable & (order > torch.minimum(count // 2, count - 2))
    weight = late.double()
    number = weight.sum(dim=1, keepdim=True).clamp_min(1)
    step = torch.arange(residual.shape[1], dtype=torch.float64, device=residual.device)
    log = torch.where(late, residual.double(), 1.0).log()
    away = step - (weight * step).sum(dim=1, keepdim=True) / number
    rise = (weight * away * log).sum(dim=1) / (weight * away.square()).sum(dim=1)
    return torch.where(count[:, 0] >= 2, rise.exp(), float("nan")).to(residual.dtype)


def radius_of(
    apply: Product, like: Tensor, iterations: int, tol: float, generator: torch.Generator | None
) -> Estimate:
    """:func:`spectral_radius` of an operator on (B, D) matrices shaped as ``like``."""
    value, error, spent = _largest(apply, like, iterations, tol, generator)
    return Estimate(value.to(like), error.to(like), spent)


def lipschitz_of(
    push: Product,
    pull: Product,
    like: Tensor,
    iterations: int,
    tol: float,
    generator: torch.Generator | None,
) -> Estimate:
    """:func:`contraction_rate` of an operator on (B, D) matrices shaped as ``like``, and its transpose."""
    # An error of e in the square of a figure is one of e / 2 in the figure, both relative.
    square, error, spent = _largest(lambda v: pull(push(v)), like, iterations, 2 * tol, generator)
    root = square.sqrt()
    return Estimate(root.to(like), ((square + error).sqrt() - root).to(like), 2 * spent)


def _largest(
    apply: Product, like: Tensor, iterations: int, tol: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, int]:
    """Largest modulus of an eigenvalue and its residual, (B,) float64, and the products spent."""
    batch, size = like.shape
    nothing = torch.zeros(batch, dtype=torch.float64, device="cpu")  # whatever the default device is
    if not batch or not size:
        return nothing, nothing.clone(), 0
    space = Krylov(apply, probe(like, generator), min(_MEMORY, size, iterations))
    spent = 0
    value = error = nothing
    settled = accurate = nothing.bool()
    while True:
        steps = min(space.steps + _LOOK, space.capacity, space.steps + iterations - spent)
        spent += steps - space.steps
        space.grow(steps)
        newest, rest = _ritz(space)
        # A row that has settled keeps its figures, so that they do not depend on its batch mates.
        value, error = torch.where(settled, value, newest), torch.where(settled, error, rest)
        # Accurate at two looks in a row: of a start with next to nothing of the largest, the next largest is
        # accurate first, and the largest shows a few products later.
        before, accurate = accurate, ~(error > tol * value)  # NaN is accurate
        # Where the whole space can be kept it is filled, at little cost: nothing is missed then.
        settled = settled | (before & accurate & (size > space.capacity))
        if bool(settled.all()) or spent >= iterations or space.steps >= size:
            return value, error, spent
        if space.steps == space.capacity:
            space = Krylov(apply, _filtered(space, newest), space.capacity)


def _ritz(space: Krylov) -> tuple[Tensor, Tensor]:
    """Largest modulus among the Ritz values and the residual of its Ritz pair, (B,) float64."""
    value, vector, broken = dominant(space)
    # |last entry of the Ritz vector| times the last subdiagonal entry of H is ||A y - theta y||.
    error = space.h[:, -1, -1].abs() * vector[:, -1].abs()
    return torch.where(broken, float("nan"), value.abs()), torch.where(broken, float("nan"), error)


def dominant(space: Krylov, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The Ritz pair of largest modulus, or of the value nearest to a given one, row by row.

    Returns:
        (B,) complex values, (B, k) complex unit vectors of coefficients, (B,) bool: rows with NaN.
    """
    h = space.h
    broken = ~torch.isfinite(h).all(dim=(1, 2))
    values, vectors = torch.linalg.eig(torch.where(broken[:, None, None], 0.0, h[:, :-1]))
    rank = values.abs() if near is None else -(values - near[:, None]).abs()
    best = rank.argmax(dim=1)
    vector = vectors.gather(2, best[:, None, None].expand(-1, h.shape[2], 1))[..., 0]
    return values.gather(1, best[:, None])[:, 0], vector, broken


def _filtered(space: Krylov, value: Tensor) -> Tensor:
    """A start that is rich in what has the largest modulus: ``V (H / value)^p e_1``, all real."""
    h = torch.nan_to_num(space.h[:, :-1]) / value.nan_to_num(1.0).clamp_min(1e-300)[:, None, None]
    y = h.new_zeros(h.shape[0], h.shape[1])
    y[:, 0] = 1
    for _ in range(_FILTER):
        y = torch.einsum("bij,bj->bi", h, y)
        y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1e-300)
    return space.combine(y)


def _check(iterations: int, tol: float, generator: torch.Generator | None) -> None:
    check_generator(generator)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations must be a whole number, at least 1; got {iterations!r}.")
    if not is_number(tol) or not tol >= 0:
        raise OptionError(f"tol must be a number, at least 0; got {tol!r:.40}.")
