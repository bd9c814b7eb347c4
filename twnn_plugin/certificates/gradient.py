"""How far a state and its implicit gradient are from those of the exact fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import MapError, OptionError
from ..state import Layout, outside_inference
from ..types import Solution, State
from .linear import Jacobian, check_generator, probe
from .spectrum import lipschitz_of, radius_of

__all__ = ["Cotangent", "GradientError", "amplification", "gradient_error", "gradient_error_of"]

Cotangent = State | Callable[[State], Tensor]
"""dL/dz as a state, or the loss itself as a function of the state."""


class GradientError(NamedTuple):
    """Relative errors of the implicit gradient: of each row's own, (B,), and of the weights', a scalar.

    Attributes:
        state: (B,) from differentiating at ``z`` instead of ``z*``; an estimate, first order in ``z - z*``.
        adjoint: (B,) from stopping the backward solve early; a bound where the map is a contraction.
        total: (B,) their sum.
        weights: () of the gradient of all that ``f`` closes over, summed over the rows that are finite;
            zero if it closes over nothing that wants a gradient.
    """

    state: Tensor
    adjoint: Tensor
    total: Tensor
    weights: Tensor


def gradient_error(
    f: Callable[..., State],
    solution: Solution | State,
    *context: Tensor,
    cotangent: Cotangent | None = None,
    adjoint_residual: Tensor | float | None = None,
    iterations: int = 40,
    generator: torch.Generator | None = None,
) -> GradientError:
    """Relative error of the implicit gradient, row by row, estimated at the solution at hand.

    With ``r = f(z) - z`` a Newton step ``e = (I - J)^-1 r`` leads to ``z* ~ z + e``, and the gradient
    is worked out at both ends: ``G = (df/dcontext)^T u``, ``(I - J^T) u = g``, each linear system by
    GMRES. ``state = ||G(z + e) - G(z)|| / ||G(z + e)||`` thus holds what the change of J, of df/dcontext
    and (where a loss is given) of g does to it. Without floating-point context ``G = u``.

    A backward residual ``rho = J^T u + g - u`` costs ``||(I - J^T)^-1|| ||rho||`` at most, so
    ``adjoint = a ||rho|| / ||u||`` with a as in :func:`amplification`: a bound on the error of u
    where the local Lipschitz constant is below 1, otherwise an estimate. Where a state has parts, all of
    this is in units of the rms of each part (a cotangent's unit is the inverse), as the backward solve is.

    The gradient of shared weights is ``sum_i (df_i/dweights)^T u_i``, worked out at both ends as well. Its
    adjoint part takes the errors of the rows as independent of each other.

    Not covered: terms of second order in ``z - z*`` (so only states near the solution), adjoints that
    are approximate by construction (``one_step``, ``phantom``), rounding, and GMRES running out of
    ``iterations``.

    Args:
        f: as given to ``fix``.
        solution: what ``fix`` returned, or a state.
        *context: as given to ``fix``.
        cotangent: dL/dz as a state, or a function that makes the loss from a state; ``None``: a random
            direction, in which all parts of a state count alike.
        adjoint_residual: (B,) or a number, the backward residual relative to ``||g||``, for a state of
            several parts with each times its rms; ``None``: that of ``solution.adjoint``, and zero if no
            backward solve has run.
        iterations: of each linear solve and spectral estimate, at most; >= 1.
        generator: of random directions; ``None``: a fixed seed.

    Returns:
        A :class:`GradientError`, NaN in rows with NaN or inf.

    Raises:
        OptionError: an option is out of range.
        MapError: ``f``, the context or the cotangent does not fit the state.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations must be a whole number, at least 1; got {iterations!r}.")
    check_generator(generator)
    state = solution.value if isinstance(solution, Solution) else solution
    jacobian = Jacobian(f, state, context)
    like = jacobian.z.detach()
    push, pull = jacobian.push_in_units, jacobian.pull_in_units
    lipschitz = lipschitz_of(push, pull, like, iterations, 1e-3, generator).value
    radius = radius_of(pull, like, iterations, 1e-3, generator).value
    if adjoint_residual is None:
        report = solution.adjoint if isinstance(solution, Solution) else None
        adjoint_residual = 0.0 if report is None else report.residual.detach()
    factor = amplification(lipschitz, radius)
    step = jacobian.solve(jacobian.residual, iterations)
    return gradient_error_of(f, jacobian, step, factor, cotangent, adjoint_residual, iterations, generator)


def amplification(lipschitz: Tensor, radius: Tensor) -> Tensor:
    """(B,) what ``(I - J)^-1`` makes of a residual, at most.

    ``1 / (1 - L)`` where the Lipschitz constant L is below 1 (Neumann series, a bound on the norm), else
    ``1 / (1 - radius)`` (an estimate: a J whose radius is below L is not normal), and inf where that is no
    help. The norm and the constant are those of the same units.
    """
    rate = torch.where(lipschitz < 1, lipschitz, radius)
    inverse = 1 / (1 - rate)
    return torch.where(rate.isnan(), rate, torch.where(rate < 1, inverse, float("inf")))


def gradient_error_of(
    f: Callable[..., State],
    jacobian: Jacobian,
    step: Tensor,
    factor: Tensor,
    cotangent: Cotangent | None,
    adjoint_residual: Tensor | float,
    iterations: int,
    generator: torch.Generator | None,
) -> GradientError:
    """:func:`gradient_error` with a Jacobian, the Newton step and the amplification in units at hand."""
    layout, z = jacobian.layout, jacobian.z.detach()
    moved = Jacobian(f, z + step, jacobian.context, layout)
    if cotangent is None:
        g = g_moved = jacobian.per_unit(probe(z, None if generator is None else generator.clone_state()))
    else:
        g, g_moved = (_cotangent(cotangent, layout, end) for end in (z, z + step))
    u = jacobian.solve_transposed(g, iterations)
    # From u on, so that what GMRES leaves over is the same at both ends and cancels.
    u_moved = u + moved.solve_transposed(moved.pull(u) + g_moved - u, iterations)
    before, after = jacobian.pull_context(u), moved.pull_context(u_moved)
    if before is None or after is None:
        before, after = jacobian.times_unit(u), jacobian.times_unit(u_moved)
    state = _ratio(_norm(after - before), _norm(after))
    # The backward residual is told in these units, and so is the amplification.
    size_g, size = _norm(jacobian.times_unit(g)), _norm(jacobian.times_unit(u))
    residual = _per_row(adjoint_residual, z)
    share = torch.where(residual == 0, 0.0, residual * factor)  # 0 * inf is no error
    adjoint = torch.where(u.isfinite().all(dim=1), _ratio(share * size_g, size), float("nan"))
    weights = _weights(f, layout, (z, z + step), jacobian.context, (u, u_moved))
    if weights is None:
        weights = z.new_zeros(())
    else:
        sound = adjoint.isfinite() & u.isfinite().all(dim=1)
        size = torch.where(sound, size, 0.0)
        spread = _ratio(_total(torch.where(sound, adjoint, 0.0) * size), _total(size))
        weights = weights + torch.where(adjoint.isinf().any(), float("inf"), spread)
    return GradientError(state, adjoint, state + adjoint, weights)


def _per_row(residual: Tensor | float, like: Tensor) -> Tensor:
    """(B,) the backward residual of each row, from one for each or one for all."""
    try:
        tensor = torch.as_tensor(residual, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    good = tensor is not None and not tensor.is_complex() and tensor.dtype is not torch.bool
    fits = good and tensor is not None and tensor.shape in ((), (1,), like.shape[:1])
    if tensor is None or not fits or bool((tensor < 0).any()):
        got = f"{residual!r:.40}" if tensor is None or fits else f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise OptionError(
            f"adjoint_residual must be a number, or a tensor of shape ({like.shape[0]},), one for each row, "
            f"and not negative; got {got}."
        )
    return tensor.to(like.dtype).expand(like.shape[0])


def _cotangent(given: Cotangent, layout: Layout, z: Tensor) -> Tensor:
    if not callable(given) or isinstance(given, Tensor):
        return layout.match(given, z, "The cotangent").detach()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outside_inference(z).detach().requires_grad_()
        loss = given(layout.unpack(leaf))
        if not isinstance(loss, Tensor):
            raise MapError(f"A cotangent that is a function must return a loss; got a {type(loss).__name__}.")
        if not loss.requires_grad:
            raise MapError(
                "The cotangent's loss has no graph: it does not depend on the state, or was detached. Make "
                "it of the state that the function is given, by differentiable operations."
            )
        (g,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    if g is None:
        raise MapError("The cotangent's loss does not depend on the state that the function is given.")
    return g


def _weights(
    f: Callable[..., State],
    layout: Layout,
    states: tuple[Tensor, Tensor],
    context: list[Tensor],
    cotangents: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Relative change of the gradient of what ``f`` closes over, from the first end to the second.

    None if ``f`` closes over nothing that wants a gradient, or no row is finite.
    """
    sound = (cotangents[0] + cotangents[1] + states[1]).isfinite().all(dim=1)
    if not bool(sound.any()):  # an empty batch need be nothing that f knows how to take
        return None
    if not bool(sound.all()):
        if not context:  # f may close over the batch: rows cannot be left out
            return states[0].new_tensor(float("nan"))
        keep = torch.nonzero(sound).flatten()
        states = states[0][keep], states[1][keep]
        cotangents = cotangents[0][keep], cotangents[1][keep]
        context = [c[keep] for c in context]
    context = [c.detach() for c in context]
    ends = []
    for z, u in zip(states, cotangents, strict=True):
        # As in the Jacobian: in inference mode there would be no graph, and no weights to speak of.
        with torch.inference_mode(False), torch.enable_grad():
            z, u = outside_inference(z), outside_inference(u)
            fz = layout.pack(f(layout.unpack(z), *map(outside_inference, context)), z.shape[0])
            into = _leaves_of(fz)
            if not into:
                return None
            grads = torch.autograd.grad(fz, into, u, allow_unused=True, materialize_grads=True)
        ends.append(torch.cat([g.flatten().to(z.dtype) for g in grads]))
    return _ratio(_total(ends[1] - ends[0]), _total(ends[1]))


def _leaves_of(value: Tensor) -> list[Tensor]:
    """The leaf tensors that a value's graph reaches, in a fixed order."""
    found: list[Tensor] = []
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.append(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _total(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Zero where there is nothing to be wrong about."""
    return torch.where((part == 0) & (whole == 0), 0.0, part / whole)
