"""Float64 references: the fixed point and its gradient by plain iteration, and how many steps each row takes.

Nothing of the library under test is used. Rows leave as they settle, so that a slow few cost little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problems import Problem, flat

__all__ = ["LADDER", "Reference", "at_most", "gradient_error", "reference_of"]

LADDER = tuple(10.0 ** (-k / 4) for k in range(2, 27))
"""Tolerances that are tried: quarter-decades from 3e-1 to 3e-7."""


@dataclass
class Reference:
    """The truth in float64, on the CPU.

    Attributes:
        z: (B, D) the solution.
        parameters: (P,) the gradient of all parameters, flattened.
        x: (B, ...) the gradient of the first context tensor.
        steps: by tolerance of :data:`LADDER`, (B,) evaluations that plain iteration needs.
        products: the same for the vector-Jacobian products of the plain adjoint iteration.
        residual: largest relative residual left, forward and adjoint.
    """

    z: Tensor
    parameters: Tensor
    x: Tensor
    steps: dict[float, Tensor]
    products: dict[float, Tensor]
    residual: tuple[float, float]

    def max_steps(self, tol: float) -> int:
        """Evaluations by which plain iteration has met ``tol`` in every row."""
        return int(self.steps[at_most(tol)].max())

    def max_products(self, tol: float) -> int:
        """The same for the adjoint."""
        return int(self.products[at_most(tol)].max())


def at_most(tol: float) -> float:
    """The largest tolerance of :data:`LADDER` that is at most ``tol`` (up to rounding), or the last."""
    return next((step for step in LADDER if step <= tol * 1.001), LADDER[-1])


def _like(matrix: Tensor, state: Any) -> Any:
    if isinstance(state, Tensor):
        return matrix.view(matrix.shape[0], *state.shape[1:])
    sizes = [part[0].numel() for part in state]
    columns = matrix.split(sizes, dim=1)
    return tuple(c.reshape(matrix.shape[0], *p.shape[1:]) for c, p in zip(columns, state, strict=True))


class _Rows:
    """Plain iteration of a row-wise map on the rows that have not settled."""

    def __init__(self, start: Tensor, scale: Tensor | None, tol: float, limit: int):
        self.z, self.scale, self.tol, self.limit = start.clone(), scale, tol, limit
        self.first = torch.full((len(LADDER), start.shape[0]), limit, device=start.device)
        self.residual = torch.zeros_like(start[:, 0])

    def iterate(self, make_map: Any) -> None:
        """``make_map(rows)`` gives the map of these rows."""
        rows = torch.arange(self.z.shape[0], device=self.z.device)
        ladder = torch.tensor(LADDER, device=self.z.device, dtype=self.z.dtype)[:, None]
        step_of, z = make_map(rows), self.z
        for k in range(1, self.limit + 1):
            fz = step_of(z)
            size = flat(fz).norm(dim=1) if self.scale is None else self.scale[rows]
            change = (fz - z).norm(dim=1) / (size + 1e-300)
            met = torch.where(change <= ladder, k, self.limit)
            self.first[:, rows] = torch.minimum(self.first[:, rows], met)
            z = fz
            going = change > self.tol
            if not bool(going.any()) or k == self.limit or int(going.sum()) <= 0.6 * len(rows):
                self.z[rows], self.residual[rows] = z, change
                rows, z = rows[going], z[going]
                if len(rows) == 0 or k == self.limit:
                    return
                step_of = make_map(rows)


def reference_of(problem: Problem, tol: float = 1e-11, limit: int = 4000) -> Reference:
    """Solve a float64 problem, on the device where it lies, for its fixed point and gradient.

    Args:
        problem: in float64.
        tol: relative residual at which a row has settled.
        limit: iterations at most.

    Raises:
        RuntimeError: a row has not settled to ``1000 * tol``.
    """
    start, f = flat(problem.z0), problem.f
    forward = _Rows(start, None, tol, limit)

    def map_of(rows: Tensor) -> Any:
        context = tuple(c[rows] for c in problem.context)

        def step(z: Tensor) -> Tensor:
            with torch.no_grad():
                return flat(f(_like(z, problem.z0), *context))

        return step

    forward.iterate(map_of)
    z, g = forward.z, flat(problem.cotangent)
    adjoint = _Rows(g, g.norm(dim=1), tol, limit)

    def transposed_of(rows: Tensor) -> Any:
        at = z[rows].requires_grad_()
        value = flat(f(_like(at, problem.z0), *(c[rows] for c in problem.context)))
        return lambda u: torch.autograd.grad(value, at, u, retain_graph=True)[0] + g[rows]

    adjoint.iterate(transposed_of)
    residual = float(forward.residual.max()), float(adjoint.residual.max())
    if not max(residual) <= 1000 * tol:
        raise RuntimeError(f"the reference of {problem.name} has not settled: residuals {residual}")
    x = problem.context[0].detach().requires_grad_()
    value = flat(f(_like(z, problem.z0), x, *problem.context[1:]))
    gradients = torch.autograd.grad(value, [x, *problem.parameters], adjoint.z)
    weights = torch.cat([gradient.flatten() for gradient in gradients[1:]])
    steps, products = (dict(zip(LADDER, solved.first.cpu(), strict=True)) for solved in (forward, adjoint))
    return Reference(z.cpu(), weights.cpu(), gradients[0].cpu(), steps, products, residual)


def gradient_error(reference: Reference, parameters: Tensor, x: Tensor) -> float:
    """The larger of the relative errors of the parameters' gradient and of the input's; inf if not finite."""
    errors = []
    for got, truth in ((parameters, reference.parameters), (x, reference.x)):
        got = got.detach().to("cpu", torch.float64)
        errors.append(float((got - truth).norm() / truth.norm()))
    return max(errors) if all(e == e for e in errors) else float("inf")
