"""Accelerated solves of states whose parts differ in size."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from twnn_plugin import kernels

f64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def quiet(*arguments: Any, **options: Any) -> tw.Solution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(*arguments, **options)


def narrow(scale: float, seed: int = 0) -> tuple[Callable[..., Any], tuple[Tensor, Tensor], Tensor]:
    """A map of ten numbers and two that are ``scale`` times as large: fewer than there are differences."""
    weight = draw(12, 12, seed=seed)
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, 2)

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.tanh(torch.cat([z[0], z[1] / scale], dim=1) @ weight + x)
        return out[:, :10], scale * out[:, 10:]

    z0 = torch.zeros(8, 10, dtype=f64), torch.ones(8, 2, dtype=f64)
    return f, z0, draw(8, 12, seed=seed + 50) * torch.logspace(-3, 0.5, 8, dtype=f64)[:, None]


ACCELERATED = ("anderson", "broyden", "newton_krylov", "auto")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e2, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_steps_whatever_the_units(solver, scale, seed, compiled):
    counts = []
    for unit in (1.0, scale):
        f, z0, x = narrow(unit, seed)
        z0 = z0[0], unit * z0[1]
        with torch.no_grad(), contextlib.nullcontext() if compiled else kernels.disabled():
            solution = quiet(f, z0, x, solver=solver, tol=1e-6, max_iter=300)
        assert bool(solution.converged.all())
        counts.append(solution.evaluations)
    assert counts[1] <= 1.1 * counts[0], counts


@pytest.mark.parametrize("solver", ACCELERATED)
def test_rows_leave_with_their_units(solver):
    """Each row's parts have sizes of their own; alone it takes the same steps."""
    f, z0, x = narrow(1.0)
    size = torch.logspace(-5, 5, 8, dtype=f64)[:, None]

    def g(z, x, size):
        a, b = f((z[0], z[1] / size), x)
        return a, size * b

    z0 = z0[0], size * z0[1]
    with torch.no_grad():
        whole = quiet(g, z0, x, size, solver=solver, tol=1e-8, max_iter=300)
        assert bool(whole.converged.all()) and len(set(whole.steps.tolist())) > 2
        for row in range(8):
            pick = slice(row, row + 1)
            alone = quiet(
                g, (z0[0][pick], z0[1][pick]), x[pick], size[pick], solver=solver, tol=1e-8, max_iter=300
            )
            assert int(alone.steps[0]) == int(whole.steps[row])
            torch.testing.assert_close(alone.value[1][0], whole.value[1][row], rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_derivative_of_its_steps_is_near_that_of_the_solution(scale, seed):
    f, z0, x = narrow(scale, seed)
    x = x.requires_grad_()
    found = []
    for adjoint, tol in (("unrolled", 1e-6), ("implicit", 1e-12)):
        value = quiet(f, z0, x, adjoint=adjoint, tol=tol, max_iter=300).value
        found.append(torch.autograd.grad(value[0].sum() + (value[1] / scale).sum(), x)[0])
    assert ((found[0] - found[1]).norm(dim=1) <= 1e-3 * found[1].norm(dim=1)).all()


@pytest.mark.parametrize("start", [0, 1, 3])
def test_the_derivative_of_its_steps_in_units_is_exact(start):
    """Cut off before it converges, against differences of the whole computation."""
    f, z0, x = narrow(1e2)
    solver = tw.solver("anderson", start=start)

    def value(x: Tensor, adjoint: str) -> Tensor:
        parts = quiet(f, z0, x, solver=solver, adjoint=adjoint, tol=1e-14, max_iter=8).value
        return parts[0].sum() + (parts[1] / 1e2).sum()

    direction, leaf = draw(8, 12, seed=3), x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf, "unrolled"), leaf)
    with torch.no_grad():
        step = 1e-7 * direction
        numeric = (value(x + step, "implicit") - value(x - step, "implicit")) / 2e-7
    assert abs(float((grad * direction).sum() - numeric)) < 1e-4 * abs(float(numeric))


@pytest.mark.parametrize("every", [1, 5])
def test_units_leave_with_their_rows(every):
    f, z0, x = narrow(1e3)
    with torch.no_grad():
        whole = quiet(f, z0, x, tol=1e-8, max_iter=300, check_every=every)
        for i in range(8):
            one = quiet(f, tuple(p[i : i + 1] for p in z0), x[i : i + 1], tol=1e-8, max_iter=300)
            assert int(one.steps) == int(whole.steps[i])
            for mine, theirs in zip(one.value, whole.value, strict=True):
                torch.testing.assert_close(mine[0], theirs[i], rtol=1e-6, atol=0)
