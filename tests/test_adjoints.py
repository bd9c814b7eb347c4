"""Gradients: against dense linear algebra, finite differences and each other."""

from __future__ import annotations

import pytest
import torch

import twnn_plugin as tw
from tests import problems
from tests.methods import EXACT, NATIVE

f64 = torch.float64


def gradients(problem, cotangent, **options):
    context = (problem.context[0].clone().requires_grad_(), *problem.context[1:])
    solution = tw.fix(problem.f, problem.z0, *context, **options)
    grads = torch.autograd.grad((solution.value * cotangent).sum(), [*problem.parameters, context[0]])
    return solution, list(grads[:-1]), grads[-1]


def cotangent_of(problem):
    return torch.randn(problem.z0.shape, generator=torch.Generator().manual_seed(7), dtype=f64)


@pytest.mark.parametrize("adjoint", [*EXACT, "unrolled", "checkpointed"])
@pytest.mark.parametrize("solver", NATIVE)
@pytest.mark.parametrize("make", problems.ALL)
def test_gradients_agree_with_a_dense_reference(make, solver, adjoint):
    problem = make()
    cotangent = cotangent_of(problem)
    _, parameters, x = problems.reference(problem, cotangent)
    solution, mine, mine_x = gradients(
        problem, cotangent, solver=solver, adjoint=adjoint, tol=1e-12, max_iter=2000
    )
    assert bool(solution.converged.all())
    for a, b in zip([*mine, mine_x], [*parameters, x], strict=True):
        assert problems.relative(a, b) < 1e-6


@pytest.mark.parametrize("adjoint", [*EXACT, "unrolled", "checkpointed"])
def test_gradcheck(adjoint):
    problem = problems.vector(batch=3, size=4, norm=0.6)
    (w,), (x,) = problem.parameters, problem.context

    def solve(w, x):
        return tw.fix(
            lambda z, x: torch.tanh(z @ w + x), problem.z0, x, adjoint=adjoint, tol=1e-13, max_iter=500
        ).value

    assert torch.autograd.gradcheck(solve, (w.detach().requires_grad_(), x.clone().requires_grad_()))


def test_backward_solve_is_reported_row_by_row_and_rows_leave():
    problem = problems.mixed(batch=20)
    solution, _, _ = gradients(problem, cotangent_of(problem), tol=1e-10, max_iter=500)
    report = solution.adjoint
    assert report is not None and report.exact and report.name == "implicit"
    assert bool((report.status == int(tw.Status.converged)).all())
    assert int(report.steps[0]) < int(report.steps[-1])
    assert int(report.steps.sum()) <= report.evaluations < 20 * int(report.steps.max())
    assert bool((report.residual <= 1e-10).all())


def test_tolerance_is_relative_to_the_incoming_gradient():
    problem = problems.vector(norm=0.9)
    cotangent = cotangent_of(problem)
    _, one, _ = gradients(problem, cotangent, tol=1e-8, max_iter=500)
    _, small, _ = gradients(problem, 1e-12 * cotangent, tol=1e-8, max_iter=500)
    assert problems.relative(1e12 * small[0], one[0]) < 1e-9


def test_one_step_is_the_first_term_of_the_series():
    problem = problems.vector()
    cotangent = cotangent_of(problem)
    z, _, _ = problems.reference(problem, cotangent)
    x = problem.context[0].clone().requires_grad_()
    expected = torch.autograd.grad(problem.f(z, x), x, cotangent)[0]
    solution, _, mine = gradients(problem, cotangent, adjoint="one_step", tol=1e-12, max_iter=500)
    assert torch.allclose(mine, expected, atol=1e-9)
    assert solution.adjoint is not None and not solution.adjoint.exact


def test_value_is_the_same_with_and_without_gradients():
    problem = problems.mixed()
    with torch.no_grad():
        plain = tw.fix(problem.f, problem.z0, *problem.context, tol=1e-6, max_iter=200)
    graded = tw.fix(problem.f, problem.z0, *problem.context, tol=1e-6, max_iter=200)
    assert torch.equal(plain.value, graded.value)
    assert graded.value.requires_grad and not plain.value.requires_grad


def test_no_gradient_where_nothing_wants_one():
    x = torch.ones(2, 3)
    assert not tw.fix(lambda z, x: torch.tanh(0.5 * z + x), 0 * x, x).value.requires_grad


def test_closed_over_tensors_that_are_not_leaves_get_gradients():
    problem = problems.vector(norm=0.5)
    (w,), (x,) = problem.parameters, problem.context
    scale = torch.tensor(0.8, dtype=f64, requires_grad=True)
    scaled = scale * w
    solution = tw.fix(lambda z, x: torch.tanh(z @ scaled + x), problem.z0, x, tol=1e-12, max_iter=200)
    (mine,) = torch.autograd.grad(solution.value.sum(), scale)

    def value(s):
        return tw.fix(
            lambda z, x: torch.tanh(z @ (s * w) + x), problem.z0, x, tol=1e-13, max_iter=200
        ).value.sum()

    with torch.no_grad():
        expected = (value(scale + 1e-6) - value(scale - 1e-6)) / 2e-6
    assert abs(float(mine - expected)) < 1e-6 * abs(float(expected)) + 1e-8


def test_initial_state_gets_no_implicit_gradient():
    z0 = torch.zeros(2, 3, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    value = tw.fix(lambda z, x: torch.tanh(0.5 * z + x), z0, x, tol=1e-6).value
    gradient = torch.autograd.grad(value.sum(), z0, allow_unused=True)[0]
    assert gradient is None or not bool(gradient.any())


def test_backward_twice_with_retained_graph():
    problem = problems.vector()
    solution = tw.fix(problem.f, problem.z0, *problem.context, tol=1e-10, max_iter=200)
    loss = solution.value.sum()
    (one,) = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    (two,) = torch.autograd.grad(loss, problem.parameters)
    assert torch.equal(one, two)


def test_a_failed_backward_row_falls_back_to_one_step_and_says_so():
    # The forward map converges by Anderson although it expands; the adjoint by plain iteration cannot.
    x = torch.ones(2, 3, dtype=f64, requires_grad=True)
    adjoint = tw.adjoint("implicit", solver="picard", max_iter=200)
    solution = tw.fix(lambda z, x: x - 1.5 * z, torch.zeros(2, 3, dtype=f64), x, adjoint=adjoint, tol=1e-10)
    (gradient,) = torch.autograd.grad(solution.value.sum(), x)
    assert solution.adjoint is not None
    assert bool((solution.adjoint.status == int(tw.Status.diverged)).all())
    assert torch.equal(gradient, torch.ones_like(x))


def test_phantom_is_the_damped_series_cut_short():
    problem = problems.vector(norm=0.9)
    cotangent = cotangent_of(problem)
    z, _, exact = problems.reference(problem, cotangent)
    x = problem.context[0].clone().requires_grad_()
    state = z
    for _ in range(3):
        state = 0.5 * state + 0.5 * problem.f(state, x)
    expected = torch.autograd.grad(state, x, cotangent)[0]
    adjoint = tw.adjoint("phantom", steps=3, damping=0.5)
    solution, _, mine = gradients(problem, cotangent, adjoint=adjoint, tol=1e-12, max_iter=500)
    assert torch.allclose(mine, expected, atol=1e-9)
    assert torch.allclose(solution.value.detach(), z, atol=1e-9)
    assert solution.adjoint is not None and not solution.adjoint.exact
    errors = []
    for steps in (1, 4, 16, 64):
        adjoint = tw.adjoint("phantom", steps=steps, damping=1.0)
        _, _, mine = gradients(problem, cotangent, adjoint=adjoint, tol=1e-12, max_iter=500)
        errors.append(problems.relative(mine, exact))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 < errors[0]


def test_phantom_keeps_a_broken_row_out():
    problem = problems.vector(norm=0.5)
    x = problem.context[0].clone()
    x[2] = float("nan")
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(problem.f, problem.z0, x, adjoint="phantom", tol=1e-8)
    (gradient,) = torch.autograd.grad(solution.value[torch.arange(6) != 2].sum(), problem.parameters)
    assert bool(torch.isfinite(gradient).all()) and bool(torch.isnan(solution.value[2]).any())


def test_checkpointed_recomputes_instead_of_keeping():
    calls = []
    w = torch.nn.Parameter(torch.eye(4, dtype=f64) * 0.5)

    def f(z, x):
        calls.append(z.shape[0])
        return torch.tanh(z @ w + x)

    x = torch.ones(3, 4, dtype=f64)
    solution = tw.fix(f, 0 * x, x, adjoint="checkpointed", tol=1e-8, max_iter=100)
    forward = len(calls)
    assert forward == int(solution.steps.max())
    solution.value.sum().backward()
    # The last evaluation only measures a residual; its output is not part of the value.
    assert len(calls) in (2 * forward - 1, 2 * forward)


def test_bad_adjoint_options():
    with pytest.raises(tw.OptionError, match="steps"):
        tw.adjoint("phantom", steps=0)
    with pytest.raises(tw.OptionError, match="damping"):
        tw.adjoint("phantom", damping=1.5)
    with pytest.raises(tw.OptionError, match="tol"):
        tw.adjoint("implicit", tol=0)
    with pytest.raises(tw.OptionError, match="Did you mean 'solver'"):
        tw.adjoint("implicit", solvr="picard")
    with pytest.raises(tw.UnknownNameError, match="picard"):
        tw.adjoint("implicit", solver="picrd")


def test_rows_that_influence_each_other_are_noticed_once_rows_have_left():
    x = torch.linspace(0.1, 2.0, 12, dtype=f64)[:, None].expand(12, 3).clone().requires_grad_()

    def f(z, x):
        return torch.tanh(0.9 * x * z + 0.5 * z.mean(0) + 0.1)

    with pytest.warns(tw.ConvergenceWarning) as caught:
        solution = tw.fix(f, torch.zeros(12, 3, dtype=f64), x, tol=1e-8, max_iter=300, solver="picard")
    assert [("influence each other (batch" in str(w.message)) for w in caught] == [True, False]
    value = solution.value.detach()
    residual = (f(value, x) - value).norm(dim=1) / f(value, x).norm(dim=1)
    assert bool((residual[solution.converged] <= 4e-8).all()) and not bool(solution.converged.all())
    together = tw.fix(
        f, torch.zeros(12, 3, dtype=f64), x, tol=1e-8, max_iter=300, solver="picard", coupled=True
    )
    assert bool(together.converged.all())


def test_compiled_models_with_fix_inside_give_the_same():
    torch.manual_seed(0)
    cell = torch.nn.Linear(6, 6)
    with torch.no_grad():
        cell.weight *= 0.5

    def model(x):
        return 2 * tw.fix(lambda z, x: torch.tanh(cell(z) + x), torch.zeros_like(x), x + 1, tol=1e-5).value

    x = torch.randn(4, 6)
    out = torch.compile(model, backend="aot_eager")(x)
    (g,) = torch.autograd.grad(out.sum(), cell.weight)
    expected = model(x)
    assert torch.allclose(out, expected)
    assert torch.allclose(g, torch.autograd.grad(expected.sum(), cell.weight)[0], atol=1e-6)


@pytest.mark.parametrize("small", [1e-6, 1.0])
def test_parts_of_a_state_count_alike_whatever_their_units(small):
    """One norm over all of them would see the large one only, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    w = 0.15 * torch.randn(6, 6, generator=generator, dtype=f64)
    x = torch.randn(4, 6, generator=generator, dtype=f64)
    s = torch.tensor(0.9, dtype=f64, requires_grad=True)

    def f(state, x):
        large, tiny = state["large"], state["tiny"]
        return {"large": torch.tanh(large @ w + x), "tiny": s * tiny.flip(1) + small * large}

    zero = torch.zeros_like(x)
    solution = tw.fix(f, {"large": zero, "tiny": zero}, x, tol=1e-6, max_iter=400)
    assert bool(solution.converged.all())
    with torch.no_grad():
        again = f(solution.value, x)
    for part in ("large", "tiny"):
        change = (again[part] - solution.value[part]).norm(dim=1)
        assert bool((change <= 1.001e-6 * again[part].norm(dim=1)).all())
    (g,) = torch.autograd.grad(solution.value["tiny"].sum() / small, s)

    def exact(s):
        large = x
        for _ in range(300):
            large = torch.tanh(large @ w + x)
        return torch.linalg.solve(
            torch.eye(6, dtype=f64) - s * torch.eye(6, dtype=f64).flip(1), large, left=False
        ).sum()

    (expected,) = torch.autograd.grad(exact(s), s)
    assert abs(float(g - expected)) < 3e-5 * abs(float(expected))


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point", "one_step"])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_a_start_that_alone_wants_a_gradient_gets_zeros_without_a_solve(slope, adjoint):
    x, z0 = torch.ones(2, 3), torch.zeros(2, 3, requires_grad=True)

    def f(z, x):
        return slope * z + x if slope else 0.5 * x

    solution = tw.fix(f, z0, x, adjoint=adjoint)
    (g,) = torch.autograd.grad(solution.value.sum(), z0, create_graph=True)
    assert torch.equal(g, torch.zeros_like(z0)) and solution.adjoint is None
