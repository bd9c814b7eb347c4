"""Newton-Krylov: expanding maps, honest counts, rows at stages of their own, derivatives through it."""

from __future__ import annotations

import warnings

import pytest
import torch

import twnn_plugin as tw
from tests import problems

f64 = torch.float64


def solve(f, z0, *context, **options):
    options = {"solver": "newton_krylov", "tol": 1e-10, "max_iter": 300, **options}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(f, z0, *context, **options)


def inputs(batch, size, seed=0):
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=f64)


def test_an_expanding_map_that_plain_steps_cannot_solve():
    x = inputs(8, 10)
    scale = torch.linspace(-4, 0.9, 10, dtype=f64)

    def f(z, x):
        return scale * torch.atan(z) + x

    solution = solve(f, 0 * x, x)
    assert bool(solution.converged.all())
    z = solution.value
    assert bool(((f(z, x) - z).norm(dim=1) <= 1e-10 * f(z, x).norm(dim=1)).all())
    assert not bool(solve(f, 0 * x, x, solver="picard").converged.all())


def test_a_linear_map_takes_about_as_many_evaluations_as_it_has_dimensions():
    x = inputs(4, 6)
    w = inputs(6, 6, 1) * 2
    solution = solve(lambda z, x: z @ w + x, 0 * x, x, solver=tw.solver("newton_krylov", forcing=1e-3))
    exact = torch.linalg.solve((torch.eye(6, dtype=f64) - w).T, x.T).T
    assert bool(solution.converged.all())
    assert torch.allclose(solution.value, exact, rtol=1e-7)
    assert int(solution.steps.max()) <= 3 * (6 + 2)


def test_every_evaluation_is_counted_and_bounded():
    problem = problems.mixed(batch=16)
    seen, iterations = [], []

    def f(z, *context):
        seen.append(z.shape[0])
        return problem.f(z, *context)

    solution = solve(f, problem.z0, *problem.context, tol=1e-8, callback=iterations.append)
    assert solution.evaluations == sum(seen) >= int(solution.steps.sum())
    assert len(seen) == int(solution.steps.max())
    assert [i.step for i in iterations] == list(range(1, len(seen) + 1))
    for most in (1, 2, 5, 9):
        seen.clear()
        solution = solve(f, problem.z0, *problem.context, tol=1e-14, max_iter=most)
        assert len(seen) == most
        assert solution.steps.tolist() == [most] * 16
        assert solution.status.tolist() == [int(tw.Status.max_iter)] * 16
        assert bool(torch.isfinite(solution.residual).all())


def test_a_step_that_overshoots_is_not_taken():
    """Newton's method on atan diverges from |z| > 1.39; ``z + 2 atan(z)`` expands as well."""
    z0 = torch.tensor([[0.5], [1.3], [1.5], [2.0], [3.0]], dtype=f64)
    x = torch.zeros_like(z0)
    solution = solve(lambda z, x: z + 2 * torch.atan(z) + x, z0, x, stop="abs")
    assert bool(solution.converged.all())
    assert bool((solution.value.abs() < 1e-9).all())


def test_a_map_without_a_fixed_point_is_not_called_converged():
    x = inputs(4, 3).abs()
    for f in (lambda z, x: z + 1 + x, lambda z, x: z * z + 1 + x, lambda z, x: torch.exp(z) + x):
        solution = solve(f, 0 * x, x, stop="abs", tol=1e-6)
        assert not bool(solution.converged.any())


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_float32_differences_converge(tol):
    problem = problems.vector(batch=8, size=30, norm=0.95)
    (w,), (x,) = problem.parameters, problem.context
    w, x = w.detach().float(), x.float()
    solution = solve(lambda z, x: torch.tanh(z @ w + x), 0 * x, x, tol=tol)
    assert bool(solution.converged.all())
    exact, _, _ = problems.reference(problem, torch.ones_like(problem.z0))
    assert problems.relative(solution.value.double(), exact) < 50 * tol


def test_half_precision_shows_in_the_values_of_f():
    x = inputs(4, 12).bfloat16()
    w = (inputs(12, 12, 1) / 5).bfloat16()
    solution = solve(lambda z, x: torch.tanh(z @ w + x), 0 * x, x, tol=2e-2, max_iter=60)
    assert bool(solution.converged.all()) and solution.value.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-8, 1e12])
def test_any_scale_of_the_state(scale):
    x = inputs(4, 6)

    def f(z, x):
        return scale * torch.tanh(0.9 * z / scale + x)

    one = solve(lambda z, x: torch.tanh(0.9 * z + x), 0 * x, x, tol=1e-8)
    other = solve(f, 0 * x, x, tol=1e-8)
    assert problems.relative(other.value / scale, one.value) < 1e-6


@pytest.mark.parametrize("make", problems.ALL)
def test_the_unrolled_gradient_tends_to_the_implicit_one(make):
    problem = make()
    cotangent = inputs(*problem.z0.shape, seed=7)
    _, parameters, of_x = problems.reference(problem, cotangent)
    errors = []
    for tol in (1e-4, 1e-12):
        x = problem.context[0].clone().requires_grad_()
        solution = tw.fix(
            problem.f,
            problem.z0,
            x,
            *problem.context[1:],
            solver="newton_krylov",
            adjoint="unrolled",
            tol=tol,
            max_iter=300,
        )
        got = torch.autograd.grad((solution.value * cotangent).sum(), [*problem.parameters, x])
        wanted = [*parameters, of_x]
        errors.append(max(problems.relative(a, b) for a, b in zip(got, wanted, strict=True)))
    assert errors[1] < 1e-8 < errors[0] < 1e-1


def test_the_unrolled_gradient_is_that_of_the_steps_that_were_made():
    """Cut off before it converges, against differences of the whole computation."""
    problem = problems.vector(batch=3, size=5, norm=0.9)
    (w,), (x,) = problem.parameters, problem.context

    def value(w):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            return tw.fix(
                lambda z, x: torch.tanh(z @ w + x),
                problem.z0,
                x,
                solver="newton_krylov",
                adjoint="unrolled",
                tol=1e-14,
                max_iter=9,
            ).value.sum()

    direction = inputs(5, 5, 3)
    (grad,) = torch.autograd.grad(value(w), w)
    with torch.no_grad():
        numeric = (value(w + 1e-5 * direction) - value(w - 1e-5 * direction)) / 2e-5
    assert abs(float((grad * direction).sum() - numeric)) < 1e-3 * abs(float(numeric))


def test_coupled_rows_are_one_system():
    x = inputs(6, 5)

    def f(z, x):
        return -0.95 * z.roll(1, 0) + 0.5 * torch.sin(z.mean(0, keepdim=True)) + x

    solution = solve(f, 0 * x, x, coupled=True, tol=1e-8, max_iter=100)
    assert bool(solution.converged.all()) and len(set(solution.steps.tolist())) == 1
    change = (f(solution.value, x) - solution.value).norm(dim=1)
    assert bool((change <= 1e-8 * f(solution.value, x).norm(dim=1)).all())


@pytest.mark.parametrize(
    "options", [{"memory": 0}, {"memory": 1.5}, {"memory": True}, {"forcing": 0}, {"forcing": 1}]
)
def test_bad_options(options):
    with pytest.raises(tw.OptionError, match=f"{next(iter(options))} of solver 'newton_krylov'"):
        tw.solver("newton_krylov", **options)


def test_the_smallest_memory_works():
    problem = problems.vector(norm=0.8)
    solution = solve(problem.f, problem.z0, *problem.context, solver=tw.solver("newton_krylov", memory=1))
    assert bool(solution.converged.all())
