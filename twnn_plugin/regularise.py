"""Losses that keep a map contracting: Jacobian regularisation with gradients that reach the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .certificates.linear import (
    Jacobian,
    Krylov,
    check_context,
    check_generator,
    evaluated,
    plain_attention,
    probe,
)
from .certificates.spectrum import dominant
from .errors import OptionError, nearest
from .solvers.base import is_number
from .state import Layout, outside_inference
from .types import State

__all__ = ["jacobian_frobenius", "spectral_penalty"]

_REDUCTIONS = ("mean", "none")
_MEASURES = ("lipschitz", "radius")
_DEFECTIVE = 1e-3  # cosine between left and right eigenvector below which the gradient is capped


def jacobian_frobenius(
    f: Callable[..., State],
    z: State,
    *context: Tensor,
    samples: int | str = 1,
    generator: torch.Generator | None = None,
    through_solution: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """``||df/dz||_F^2 / D``, estimated row by row: the Jacobian regularisation of Bai et al. (2021).

    Bai, Koltun & Kolter, "Stabilizing equilibrium models by Jacobian regularization":
    ``E ||v^T J||^2 = ||J||_F^2`` for random v with unit covariance (Hutchinson 1990); here v has entries
    of -1 and 1, whose estimate varies less than that of Gaussian ones. The result is differentiable: its
    gradient reaches whatever ``f`` closes over and the context. Add it to the loss with a weight of the
    order of 0.1 to 1, or for every few steps only; it costs an evaluation of ``f`` and a
    product, and twice that backward. From the first step of training on it can collapse a map to one
    that settles fast and ignores its state.

    Args:
        f: ``f(z, *context)``, rows independent, twice differentiable in reverse mode. Torch's attention is:
            here it runs without its fused kernels, which are not.
        z: state (B, ...), tensor, tuple or dict; usually ``solution.value``.
        *context: tensors (B, ...).
        samples: random vectors per row, >= 1, or ``"exact"``: all D unit vectors, with no randomness.
        generator: of the random vectors; ``None``: torch's global one.
        through_solution: let the gradient flow through ``z``, too, where it carries one (an exact adjoint
            of ``fix`` does). Otherwise ``z`` is a constant, as in Bai et al.'s code.
        reduction: ``"mean"`` over the batch, or ``"none"``: (B,).

    Returns:
        A scalar or (B,) tensor, of the dtype that the solver works in (at least float32).

    Raises:
        OptionError: an option is out of range.
        MapError: ``f`` or the context does not fit the state.

    Example:
        >>> import torch, twnn_plugin as tw
        >>> cell, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> f = lambda z, x: torch.tanh(cell(z) + x)
        >>> solution = tw.fix(f, torch.zeros(4, 8), x)
        >>> loss = solution.value.square().mean() + 0.5 * tw.jacobian_frobenius(f, solution.value, x)
        >>> loss.backward()
    """
    exact = samples == "exact"
    if not exact and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise OptionError(f"samples must be a whole number, at least 1, or 'exact'; got {samples!r}.")
    _choice("reduction", reduction, _REDUCTIONS)
    if not isinstance(through_solution, bool):
        raise OptionError(f"through_solution must be True or False; got {through_solution!r}.")
    check_generator(generator)
    flat, fz = _attached(f, z, context, through_solution)
    batch, size = flat.shape
    total = flat.new_zeros(batch)
    if size:
        for index in range(size if exact else int(samples)):
            if exact:
                v = torch.zeros_like(flat)
                v[:, index] = 1
            else:
                v = _signs(flat, generator)
            total = total + _pull(fz, flat, v).square().sum(dim=1)
        total = total / (size if exact else size * int(samples))
    return _reduce(total, reduction)


def spectral_penalty(
    f: Callable[..., State],
    z: State,
    *context: Tensor,
    target: float = 0.9,
    measure: str = "lipschitz",
    iterations: int = 20,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``max(0, s - target)^2``, with s the largest singular value or eigenvalue of df/dz, row by row.

    Unlike the Frobenius norm it leaves maps alone that contract well enough. The vectors that belong to
    s are found without a graph (``iterations`` products, Krylov); then
    ``ds = u^T dJ v`` for unit singular vectors, and ``d|l| = Re(conj(l) / |l| * x^T dJ y / (x^T y))``
    for an eigenvalue l with left and right eigenvectors x, y (Magnus 1985), complex ones included.
    Exact where s is simple and the vectors have converged. For an almost defective eigenvalue the
    gradient is capped: x and y count as if their cosine were at least 1e-3. ``z`` is a constant.

    Args:
        f: ``f(z, *context)``, rows independent, twice differentiable in reverse mode. Torch's attention is:
            here it runs without its fused kernels, which are not.
        z: state (B, ...), tensor, tuple or dict; usually ``solution.value``.
        *context: tensors (B, ...).
        target: s is free up to here. >= 0.
        measure: ``"lipschitz"``: the largest singular value, whose being below 1 makes ``f`` a contraction
            near ``z``; ``"radius"``: the largest modulus of an eigenvalue, which is what
            convergence of plain iteration needs, and no more.
        iterations: steps of the Krylov method, >= 1; too few see too small an s.
        generator: of the first direction; ``None``: a fixed seed.
        reduction: ``"mean"`` over the batch, or ``"none"``: (B,).

    Returns:
        A scalar or (B,) tensor, of the dtype that the solver works in (at least float32).

    Raises:
        OptionError: an option is out of range.
        MapError: ``f`` or the context does not fit the state.
    """
    _choice("reduction", reduction, _REDUCTIONS)
    _choice("measure", measure, _MEASURES)
    if not is_number(target) or not target >= 0:
        raise OptionError(f"target must be a number, at least 0; got {target!r:.40}.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations must be a whole number, at least 1; got {iterations!r}.")
    check_generator(generator)
    flat, fz = _attached(f, z, context, through_solution=False)
    if flat.numel() == 0:
        return _reduce(flat.new_zeros(flat.shape[0]), reduction)
    jacobian = Jacobian(f, z, context)
    figure = _singular_value if measure == "lipschitz" else _eigenvalue
    s = figure(jacobian, flat, fz, min(iterations, flat.shape[1]), generator)
    return _reduce((s - target).clamp_min(0).square(), reduction)


def _singular_value(
    jacobian: Jacobian, flat: Tensor, fz: Tensor, steps: int, generator: torch.Generator | None
) -> Tensor:
    """(B,) the largest singular value, with a graph."""
    space = Krylov(lambda v: jacobian.pull(jacobian.push(v)), probe(flat, generator), steps)
    space.grow(steps)
    _, y, broken = dominant(space)
    v = _finite(space.combine(y.real), broken)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = jacobian.push(v)
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    u = u / torch.where(length > 0, length, 1.0)
    return (_pull(fz, flat, u) * v).sum(dim=1)


def _eigenvalue(
    jacobian: Jacobian, flat: Tensor, fz: Tensor, steps: int, generator: torch.Generator | None
) -> Tensor:
    """(B,) the largest modulus of an eigenvalue, with a graph."""
    # In units, which leave the eigenvalues: parts of another size would be rounded away.
    right = Krylov(jacobian.push_in_units, probe(flat, generator), steps)
    left = Krylov(jacobian.pull_in_units, probe(flat, generator), steps)
    right.grow(steps)
    left.grow(steps)
    value, coefficients, broken = dominant(right)
    y = [_finite(right.combine(part), broken) for part in (coefficients.real, coefficients.imag)]
    # J and its transpose have the same eigenvalues: the left vector is that of the nearest one.
    _, coefficients, _ = dominant(left, near=value)
    x = [_finite(left.combine(part), broken) for part in (coefficients.real, coefficients.imag)]
    x_c, y_c = torch.complex(*x).to(torch.complex128), torch.complex(*y).to(torch.complex128)
    inner = (x_c * y_c).sum(dim=1)
    least = _DEFECTIVE * torch.linalg.vector_norm(x_c, dim=1) * torch.linalg.vector_norm(y_c, dim=1)
    size = inner.abs()
    inner = torch.where(size < least, inner * (least / size.clamp_min(1e-300)), inner)
    inner = torch.where(size == 0, least.to(inner.dtype), inner)
    value = value.to(flat.device)
    turn = value.conj() / value.abs().clamp_min(1e-300) / inner
    x_c = x_c * turn[:, None]
    x = [jacobian.per_unit(part.to(flat)) for part in (x_c.real, x_c.imag)]
    y = [jacobian.times_unit(part.to(flat)) for part in (y_c.real, y_c.imag)]
    slope = (_pull(fz, flat, x[0]) * y[0] - _pull(fz, flat, x[1]) * y[1]).sum(dim=1)
    return value.abs().to(flat) + (slope - slope.detach())


def _attached(
    f: Callable[..., State], z: State, context: tuple[Tensor, ...], through_solution: bool
) -> tuple[Tensor, Tensor]:
    """The states (B, D) and ``f`` of them, with a graph that reaches everything ``f`` uses."""
    layout, flat = Layout.of(z, "z")
    check_context(context, flat.shape[0])
    with torch.inference_mode(False), torch.enable_grad():
        flat, context = outside_inference(flat), tuple(outside_inference(c) for c in context)
        if not through_solution or not flat.requires_grad:
            flat = flat.detach().requires_grad_()
        with plain_attention():
            return flat, evaluated(f, layout, flat, context)


def _pull(fz: Tensor, flat: Tensor, u: Tensor) -> Tensor:
    """``J^T u`` with a graph, (B, D)."""
    if not fz.requires_grad:  # f is constant
        return torch.zeros_like(flat)
    with torch.inference_mode(False), torch.enable_grad():
        (pulled,) = torch.autograd.grad(
            fz, flat, outside_inference(u), create_graph=True, allow_unused=True, materialize_grads=True
        )
    return pulled


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return bits.to(device=like.device, dtype=like.dtype) * 2 - 1


def _finite(rows: Tensor, broken: Tensor) -> Tensor:
    """The rows, with NaN in those that were found to hold NaN or inf."""
    return torch.where(broken.to(rows.device)[:, None], float("nan"), rows)


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / max(rows.numel(), 1)


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be one of {known}; got {value!r}.{nearest(str(value), known)}")
