"""Fixed-point problems with known solutions and exact gradients.

All are in float64 by default; :func:`solution` and :func:`reference` find the fixed point by Newton's
method and the gradients by dense linear algebra, without any solver or adjoint of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ALL",
    "EVERY",
    "Problem",
    "affine",
    "by_rows",
    "conv_cell",
    "coupled",
    "dict_state",
    "expanding",
    "flatten",
    "jacobian",
    "mixed",
    "no_solution",
    "non_symmetric",
    "poisoned",
    "reference",
    "relative",
    "rotation",
    "shift",
    "solution",
    "tuple_state",
    "two_scale",
    "unflatten",
    "vector",
]

_F64 = torch.float64


@dataclass
class Problem:
    """``z = f(z, *context)`` with parameters that ``f`` closes over.

    Attributes:
        name: for messages.
        f: the map, of (state, *context).
        z0: starting state: a tensor (B, ...), or a tuple or dict of them.
        context: tensors with B rows each.
        parameters: leaves that ``f`` closes over, each with ``requires_grad``.
        coupled: the rows of ``f`` influence each other.
    """

    name: str
    f: Callable[..., Any]
    z0: Any
    context: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    coupled: bool = False


def _weights(size: int, norm: float, seed: int, symmetric: bool = True, dtype: torch.dtype = _F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, size, generator=generator, dtype=_F64)
    w = (w + w.T) / 2 if symmetric else w
    return (norm * w / torch.linalg.matrix_norm(w, 2)).to(dtype).requires_grad_()


def _inputs(batch: int, size: int, seed: int, dtype: torch.dtype = _F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, size, generator=generator, dtype=_F64).to(dtype)


def vector(
    batch: int = 6,
    size: int = 8,
    norm: float = 0.9,
    seed: int = 0,
    symmetric: bool = True,
    dtype: torch.dtype = _F64,
) -> Problem:
    """tanh(z W + x): a contraction of the given norm."""
    w, x = _weights(size, norm, seed, symmetric, dtype), _inputs(batch, size, seed + 1, dtype)
    return Problem("vector", lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), (w,))


def mixed(
    batch: int = 12, size: int = 8, seed: int = 0, hardest: float = 0.97, dtype: torch.dtype = _F64
) -> Problem:
    """Per-row contraction rates from 0.05 to ``hardest``: easy and hard rows in one batch."""
    w, x = _weights(size, 1.0, seed, dtype=dtype), _inputs(batch, size, seed + 1, dtype)
    rate = torch.linspace(0.05, hardest, batch, dtype=_F64)[:, None].to(dtype)
    return Problem(
        "mixed", lambda z, x, rate: torch.tanh(rate * (z @ w) + x), torch.zeros_like(x), (x, rate), (w,)
    )


def by_rows(
    batch: int = 8,
    size: int = 5,
    seed: int = 0,
    hardest: float = 0.9,
    squash: bool = True,
    dtype: torch.dtype = _F64,
) -> Problem:
    """:func:`mixed`, computed row by row: bit for bit the same whatever else is in the batch.

    With ``squash=False`` it is affine.
    """
    problem = mixed(batch, size, seed, hardest, dtype)
    (w,) = problem.parameters

    def f(z: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        moved = rate * z.unsqueeze(1).mul(w.T).sum(-1) + x
        return torch.tanh(moved) if squash else moved

    return replace(problem, name="by_rows", f=f)


def non_symmetric(batch: int = 6, size: int = 8, seed: int = 0) -> Problem:
    """A map whose Jacobian is far from symmetric."""
    return replace(vector(batch, size, 0.9, seed, symmetric=False), name="non_symmetric")


def affine(batch: int = 5, size: int = 6, seed: int = 0) -> Problem:
    """z W + x: a linear map, whose solution a linear solve gives."""
    w, x = _weights(size, 0.7, seed, symmetric=False), _inputs(batch, size, seed + 1)
    return Problem("affine", lambda z, x: z @ w + x, torch.zeros_like(x), (x,), (w,))


def rotation(batch: int = 5, pairs: int = 3, radius: float = 0.9, angle: float = 1.0) -> Problem:
    """z W + x, with ``pairs`` plane rotations in W: complex eigenvalues of modulus ``radius``.

    The angles are ``angle``, ``1.5 * angle``, ...: were they equal, a Krylov method would end after two
    steps by luck.
    """
    blocks = []
    for i in range(pairs):
        c, s = math.cos((1 + i / 2) * angle), math.sin((1 + i / 2) * angle)
        blocks.append(radius * torch.tensor([[c, s], [-s, c]], dtype=_F64))
    w, x = torch.block_diag(*blocks).requires_grad_(), _inputs(batch, 2 * pairs, 1)
    return Problem("rotation", lambda z, x: z @ w + x, torch.zeros_like(x), (x,), (w,))


def shift(batch: int = 4, size: int = 12, seed: int = 0) -> Problem:
    """A front that travels one place a step: a nilpotent Jacobian, settled after ``size`` steps exactly.

    Residuals do not fall on the way, which misleads extrapolation.
    """
    w = torch.linspace(0.9, 1.1, size, dtype=_F64).requires_grad_()
    x = _inputs(batch, size, seed)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], w[1:] * z[:, :-1] + 0.1 * x[:, 1:]], dim=1)

    return Problem("shift", f, torch.zeros_like(x), (x,), (w,))


def expanding(batch: int = 4, size: int = 5, factor: float = 1.5) -> Problem:
    """x - factor * z: plain iteration diverges for a factor above 1, yet there is a fixed point."""
    w, x = torch.tensor(factor, dtype=_F64, requires_grad=True), _inputs(batch, size, 0)
    return Problem("expanding", lambda z, x: x - w * z, torch.zeros_like(x), (x,), (w,))


def tuple_state(batch: int = 4, seed: int = 0) -> Problem:
    """Two tensors of different shapes, (B, 3) and (B, 2, 2), each fed to the other."""
    w, x = _weights(7, 0.7, seed, symmetric=False), _inputs(batch, 7, seed + 1)

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.tanh(torch.cat([z[0], z[1].flatten(1)], dim=1) @ w + x)
        return flat[:, :3], flat[:, 3:].unflatten(1, (2, 2))

    z0 = (x.new_zeros(batch, 3), x.new_zeros(batch, 2, 2))
    return Problem("tuple_state", f, z0, (x,), (w,))


def dict_state(batch: int = 4, seed: int = 0) -> Problem:
    """:func:`tuple_state` by name."""
    inner = tuple_state(batch, seed)
    a, b = inner.z0

    def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        a, b = inner.f((z["a"], z["b"]), x)
        return {"a": a, "b": b}

    return replace(inner, name="dict_state", f=f, z0={"a": a, "b": b})


def two_scale(batch: int = 3, channels: int = 2, seed: int = 0) -> Problem:
    """A fine (B, C, 4, 4) and a coarse (B, C, 2, 2) map that exchange, as in a multiscale DEQ."""
    w, v = _weights(channels, 0.5, seed, False), _weights(channels, 0.5, seed + 1, False)
    x = _inputs(batch, channels * 16, seed + 2).unflatten(1, (channels, 4, 4))

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = z
        up = coarse.repeat_interleave(2, -1).repeat_interleave(2, -2)
        fine = torch.tanh(torch.einsum("bchw,cd->bdhw", fine + 0.5 * up, w) + x)
        down = functional.avg_pool2d(z[0], 2)
        coarse = torch.tanh(torch.einsum("bchw,cd->bdhw", coarse + 0.5 * down, v) + x[..., :2, :2])
        return fine, coarse

    z0 = (torch.zeros_like(x), x.new_zeros(batch, channels, 2, 2))
    return Problem("two_scale", f, z0, (x,), (w, v))


def conv_cell(
    batch: int = 3, channels: int = 4, side: int = 3, seed: int = 0, dtype: torch.dtype = _F64
) -> Problem:
    """A convolution and group normalisation: 0.5 * tanh(GroupNorm(conv(z) + x))."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, channels, 3, 3, generator=generator, dtype=_F64)
    w = (0.5 * w / w.flatten(1).norm(dim=1)[:, None, None, None]).to(dtype).requires_grad_()
    x = _inputs(batch, channels * side**2, seed + 1, dtype).unflatten(1, (channels, side, side))

    def f(z: Tensor, x: Tensor) -> Tensor:
        mixed = functional.conv2d(z, w, padding=1) + x
        return 0.5 * torch.tanh(functional.group_norm(mixed, 2))

    return Problem("conv_cell", f, torch.zeros_like(x), (x,), (w,))


def coupled(batch: int = 4, size: int = 3, seed: int = 0) -> Problem:
    """tanh(z W + 0.3 mean over rows + x): each row looks at all of them."""
    w, x = _weights(size, 0.5, seed, symmetric=False), _inputs(batch, size, seed + 1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + 0.3 * z.mean(0, keepdim=True) + x)

    return Problem("coupled", f, torch.zeros_like(x), (x,), (w,), coupled=True)


def no_solution(batch: int = 6, size: int = 3, every: int = 3) -> Problem:
    """A contraction, but ``z + 1 + z^2`` in every third row, which has no real fixed point at all."""
    w, x = _weights(size, 0.5, 0), _inputs(batch, size, 1)
    flag = (torch.arange(batch) % every == every - 1).to(_F64)[:, None]

    def f(z: Tensor, x: Tensor, flag: Tensor) -> Tensor:
        return torch.where(flag > 0, z + 1 + z**2, torch.tanh(z @ w + x))

    return Problem("no_solution", f, torch.zeros_like(x), (x, flag), (w,))


def poisoned(problem: Problem, row: int, value: float) -> Problem:
    """The problem with ``value`` (NaN, infinity, 1e30) for the first context tensor of one row."""
    x = problem.context[0].clone()
    x[row] = value
    return replace(problem, name=str(value), context=(x, *problem.context[1:]))


ALL = [vector, mixed, non_symmetric, affine]
"""Builders of problems whose state is one (B, D) tensor."""

EVERY = [*ALL, rotation, shift, tuple_state, dict_state, two_scale, conv_cell, coupled]
"""Builders of every solvable problem here."""


def flatten(state: Any) -> Tensor:
    """A state as one (B, D) matrix."""
    if isinstance(state, Tensor):
        return state.reshape(state.shape[0], -1)
    parts = state.values() if isinstance(state, dict) else state
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)


def unflatten(matrix: Tensor, like: Any) -> Any:
    """A (B, D) matrix as a state of the structure and shapes of ``like``."""
    if isinstance(like, Tensor):
        return matrix.reshape(matrix.shape[0], *like.shape[1:])
    parts = list(like.values()) if isinstance(like, dict) else list(like)
    pieces = matrix.split([part[0].numel() for part in parts], dim=1)
    shaped = [piece.reshape(-1, *part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)]
    return dict(zip(like, shaped, strict=True)) if isinstance(like, dict) else tuple(shaped)


def _image(problem: Problem, z: Tensor, context: tuple[Tensor, ...]) -> Tensor:
    image = flatten(problem.f(unflatten(z, problem.z0), *context))
    return image.reshape(1, -1) if problem.coupled else image


def jacobian(problem: Problem, z: Tensor) -> Tensor:
    """(B, D, D) Jacobians of ``f`` at the (B, D) states; (1, B * D, B * D) for coupled rows."""
    context = tuple(c.detach() for c in problem.context)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        image = _image(problem, z, context)
        rows = [
            torch.autograd.grad(image[:, d].sum(), z, retain_graph=True)[0] for d in range(image.shape[1])
        ]
    return torch.stack([row.reshape(image.shape) for row in rows], dim=1).detach()


def _step(problem: Problem, z: Tensor, right: Tensor, transposed: bool) -> Tensor:
    matrix = jacobian(problem, z)
    matrix = torch.eye(matrix.shape[-1], dtype=z.dtype) - (matrix.mT if transposed else matrix)
    right = right.reshape(matrix.shape[0], -1, 1)
    return torch.linalg.solve(matrix, right).reshape(z.shape)


def solution(problem: Problem, plain_steps: int = 30) -> Any:
    """The fixed point to about 1e-15, by plain steps and then Newton's method.

    Raises:
        ArithmeticError: Newton's method did not converge.
    """
    with torch.no_grad():
        z = z0 = flatten(problem.z0)
        for _ in range(plain_steps):
            z = _image(problem, z, problem.context).reshape(z.shape)
        z = z if float(z.abs().max()) < 1e3 else z0  # plain iteration diverges: Newton from the start
        for _ in range(60):
            residual = _image(problem, z, problem.context).reshape(z.shape) - z
            step = _step(problem, z, residual, transposed=False)
            z = z + step
            if float(step.abs().max()) <= 1e-14 * (1 + float(z.abs().max())):
                return unflatten(z, problem.z0)
    raise ArithmeticError(f"Newton's method did not solve problem {problem.name!r}.")


def reference(problem: Problem, cotangent: Any) -> tuple[Any, list[Tensor], Tensor]:
    """Solution and exact gradients of ``(cotangent * z).sum()`` by dense linear algebra.

    Args:
        problem: in float64.
        cotangent: of the structure and shapes of the state.

    Returns:
        The solution, the gradients of the parameters, and that of the first context tensor.
    """
    z = solution(problem)
    flat, g = flatten(z), flatten(cotangent)
    u = _step(problem, flat, g, transposed=True)
    x = problem.context[0].detach().requires_grad_()
    with torch.enable_grad():
        value = _image(problem, flat, (x, *problem.context[1:]))
        grads = torch.autograd.grad(value, [*problem.parameters, x], u.reshape(value.shape))
    return z, list(grads[:-1]), grads[-1]


def relative(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``."""
    return float((a - b).detach().norm() / b.detach().norm())
