"""Fixed-point problems with known properties, for every solver and adjoint to be held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Problem:
    """``z = f(z, *context)`` with parameters that ``f`` closes over."""

    name: str
    f: Callable[..., Tensor]
    z0: Tensor
    context: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]


def _weights(size: int, norm: float, seed: int, symmetric: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, size, generator=generator, dtype=torch.float64)
    w = (w + w.T) / 2 if symmetric else w
    return (norm * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()


def _inputs(batch: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, generator=generator, dtype=torch.float64)


def vector(
    batch: int = 6, size: int = 8, norm: float = 0.9, seed: int = 0, symmetric: bool = True
) -> Problem:
    """tanh(z W + x): a contraction of the given norm."""
    w, x = _weights(size, norm, seed, symmetric), _inputs(batch, size, seed + 1)
    return Problem("vector", lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), (w,))


def mixed(batch: int = 12, size: int = 8, seed: int = 0) -> Problem:
    """Per-row contraction rates from 0.05 to 0.97: easy and hard rows in one batch."""
    w, x = _weights(size, 1.0, seed), _inputs(batch, size, seed + 1)
    rate = torch.linspace(0.05, 0.97, batch, dtype=torch.float64)[:, None]
    return Problem(
        "mixed", lambda z, x, rate: torch.tanh(rate * (z @ w) + x), torch.zeros_like(x), (x, rate), (w,)
    )


def non_symmetric(batch: int = 6, size: int = 8, seed: int = 0) -> Problem:
    """A map whose Jacobian is far from symmetric."""
    problem = vector(batch, size, 0.9, seed, symmetric=False)
    problem.name = "non_symmetric"
    return problem


def affine(batch: int = 5, size: int = 6, seed: int = 0) -> Problem:
    """z W + x: a linear map, whose solution a linear solve gives."""
    w, x = _weights(size, 0.7, seed, symmetric=False), _inputs(batch, size, seed + 1)
    return Problem("affine", lambda z, x: z @ w + x, torch.zeros_like(x), (x,), (w,))


ALL = [vector, mixed, non_symmetric, affine]


def reference(problem: Problem, cotangent: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Solution to 1e-14 and exact gradients of ``(cotangent * z).sum()`` by dense linear algebra.

    Returns:
        The solution (B, D), the gradients of the parameters, and that of the first context tensor.
    """
    z = problem.z0
    with torch.no_grad():
        for _ in range(3000):
            z = problem.f(z, *problem.context)
    rows, eye = [], torch.eye(z.shape[1], dtype=z.dtype)
    for i in range(z.shape[0]):
        one = [c[i : i + 1].detach() for c in problem.context]
        jacobian = torch.autograd.functional.jacobian(lambda v, one=one: problem.f(v[None], *one)[0], z[i])
        assert isinstance(jacobian, Tensor)
        rows.append(torch.linalg.solve(eye - jacobian.detach().T, cotangent[i]))
    x = problem.context[0].detach().requires_grad_()
    value = problem.f(z, x, *problem.context[1:])
    grads = torch.autograd.grad(value, [*problem.parameters, x], torch.stack(rows))
    return z, list(grads[:-1]), grads[-1]


def relative(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((a - b).norm() / b.norm())
