"""The solver ``auto``: a choice per row that costs little and never breaks what plain steps can do."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from tests import problems

f64 = torch.float64


def inputs(batch, size, seed=0):
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=f64)


def shift(z, y):
    return torch.cat([y, z[:, :-1]], dim=1)


def rotation(size=10):
    q, _ = torch.linalg.qr(inputs(size, size, 3))
    return q


def easy():
    return problems.vector(batch=16, size=30, norm=0.3)


def slow():
    return problems.vector(batch=16, size=30, norm=0.97)


def slow_non_symmetric():
    return problems.vector(batch=16, size=30, norm=0.97, symmetric=False)


def many():
    return problems.mixed(batch=32, size=30)


def negative():
    """Eigenvalues down to -1.2: plain steps diverge."""
    x, scale = inputs(8, 10), -1.2 * torch.linspace(0.5, 1, 10, dtype=f64)
    return problems.Problem("negative", lambda z, x: scale * z + x, 0 * x, (x,), ())


def complex_pairs():
    x, q = inputs(8, 10), rotation()
    return problems.Problem("complex", lambda z, x: 0.95 * z @ q + x, 0 * x, (x,), ())


def front():
    y = inputs(6, 1)
    return problems.Problem("front", shift, torch.zeros(6, 40, dtype=f64), (y,), ())


def soft_front():
    y = inputs(6, 1)
    return problems.Problem(
        "soft front",
        lambda z, y: torch.tanh(1.5 * shift(z, y) + 0.3 * z),
        torch.zeros(6, 40, dtype=f64),
        (y,),
        (),
    )


def smeared_front():
    y = inputs(6, 1)
    return problems.Problem(
        "smeared front",
        lambda z, y: z + 0.7 * (shift(z, y) - z),
        torch.zeros(6, 40, dtype=f64),
        (y,),
        (),
    )


FRONTS = [front, soft_front, smeared_front]
EVERY = [*problems.ALL, easy, slow, slow_non_symmetric, many, negative, complex_pairs, *FRONTS]


def solve(problem, solver="auto", **options):
    options = {"tol": 1e-6, "max_iter": 600, **options}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(problem.f, problem.z0, *problem.context, solver=solver, **options)


@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@pytest.mark.parametrize("make", EVERY)
def test_it_is_never_much_worse_than_the_better_of_plain_and_anderson(make, tol):
    problem = make()
    mine = solve(problem, tol=tol)
    assert bool(mine.converged.all())
    costs = [
        other.evaluations
        for other in (solve(problem, name, tol=tol) for name in ("picard", "anderson"))
        if bool(other.converged.all())
    ]
    assert mine.evaluations <= 1.35 * min(costs)


def test_a_front_travels_at_full_speed():
    """Exact after one evaluation an entry: every step has to be a plain one."""
    problem = front()
    solution = solve(problem, tol=1e-12)
    assert solution.steps.tolist() == [41] * 6
    assert torch.equal(solution.value, problem.context[0].expand(6, 40))
    assert bool((solve(problem, "anderson", tol=1e-12).steps > 2 * 41).all())  # what it must not do


def test_easy_rows_stay_plain_and_hard_rows_are_accelerated():
    problem = many()
    mine, plain = solve(problem, tol=1e-3), solve(problem, "picard", tol=1e-3)
    easy_rows = plain.steps <= 4
    assert bool(easy_rows.any())
    assert torch.equal(mine.steps[easy_rows], plain.steps[easy_rows])
    assert torch.equal(mine.value[easy_rows], plain.value[easy_rows])
    assert int(mine.steps.max()) < 0.7 * int(plain.steps.max())


def test_rows_whose_plain_steps_diverge_are_solved_beside_rows_that_are_easy():
    x = inputs(6, 8)
    rate = torch.tensor([0.1, -1.2, 0.5, 1.5, -3.0, 0.99], dtype=f64)[:, None]
    problem = problems.Problem("mix", lambda z, x, r: r * torch.sin(z) + x, 0 * x, (x, rate), ())
    solution = solve(problem, tol=1e-9)
    assert bool(solution.converged.all())
    image = problem.f(solution.value, x, rate)
    assert bool(((image - solution.value).norm(dim=1) <= 1e-9 * image.norm(dim=1)).all())


def test_more_of_the_hard_rows_than_any_of_the_others():
    """Expanding tanh networks: each method alone loses rows; what it hands over is not lost."""
    solved = dict.fromkeys(("auto", "picard", "anderson", "newton_krylov"), 0)
    for seed in range(2):
        w, x = inputs(30, 30, seed), inputs(16, 30, seed + 9)
        w = 6 * w / torch.linalg.matrix_norm(w, 2)
        problem = problems.Problem("hard", lambda z, x, w=w: torch.tanh(z @ w + x), 0 * x, (x,), ())
        for name in solved:
            solved[name] += int(solve(problem, name, max_iter=300).converged.sum())
    assert solved["auto"] == max(solved.values()) > solved["picard"]


def test_a_map_without_a_fixed_point_is_reported():
    x = inputs(4, 3).abs()
    for f in (lambda z, x: z + 1 + x, lambda z, x: z * z + 1 + x, lambda z, x: torch.exp(z) + x):
        solution = solve(problems.Problem("none", f, 0 * x, (x,), ()), stop="abs", max_iter=200)
        assert not bool(solution.converged.any())
        assert int(solution.steps.max()) <= 200


def test_every_evaluation_is_counted_and_bounded():
    problem = many()
    seen, iterations = [], []
    inner = problem.f

    def f(z, *context):
        seen.append(z.shape[0])
        return inner(z, *context)

    problem.f = f
    solution = solve(problem, callback=iterations.append)
    assert solution.evaluations == sum(seen) >= int(solution.steps.sum())
    assert len(seen) == len(iterations) == int(solution.steps.max())
    seen.clear()
    short = solve(problem, tol=1e-14, max_iter=7)
    assert len(seen) == 7 == int(short.steps.max())


kinds = st.sampled_from(["easy", "slow", "negative", "expanding", "nan", "inf", "huge", "front"])


def company(names, seed):
    """Rows of one map with a difficulty of their own."""
    rate = {"easy": 0.1, "slow": 0.98, "negative": -1.3, "expanding": 2.5, "front": 0.0}
    x = inputs(len(names), 8, seed)
    for row, name in enumerate(names):
        x[row] *= {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}.get(name, 1.0)
    rates = torch.tensor([rate.get(name, 0.5) for name in names], dtype=f64)[:, None]
    moving = torch.tensor([name == "front" for name in names])[:, None]
    weight = inputs(8, 8, 5)
    weight = weight / torch.linalg.matrix_norm(weight, 2)

    def f(z, x, rates, moving):
        # One row at a time, so that the arithmetic does not depend on the batch.
        mixed = (z[:, :, None] * weight).sum(1)
        return torch.where(moving, shift(z, x[:, :1]), rates * torch.tanh(mixed) + x)

    return f, torch.zeros_like(x), (x, rates, moving)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    names=st.lists(kinds, min_size=1, max_size=7), seed=st.integers(0, 50), most=st.sampled_from([3, 30, 150])
)
def test_a_row_alone_is_the_row_in_company(names, seed, most):
    f, z0, context = company(names, seed)
    together = solve(problems.Problem("all", f, z0, context, ()), max_iter=most)
    for row in range(len(names)):
        one = slice(row, row + 1)
        alone = solve(problems.Problem("one", f, z0[one], tuple(c[one] for c in context), ()), max_iter=most)
        assert together.status[row] == alone.status[0]
        assert together.steps[row] == alone.steps[0]
        torch.testing.assert_close(together.value[one], alone.value, rtol=1e-7, atol=0, equal_nan=True)
    good = together.converged
    image = f(together.value, *context)[good]
    assert bool(((image - together.value[good]).norm(dim=1) <= 1e-6 * image.norm(dim=1) * (1 + 1e-9)).all())


def test_coupled_rows_are_one_system():
    x = inputs(6, 5)
    problem = problems.Problem("coupled", lambda z, x: -0.95 * z.roll(1, 0) + x, 0 * x, (x,), ())
    mine = solve(problem, coupled=True, max_iter=100)
    assert bool(mine.converged.all()) and len(set(mine.steps.tolist())) == 1
    assert not bool(solve(problem, "picard", coupled=True, max_iter=100).converged.any())


@pytest.mark.parametrize("make", [*problems.ALL, negative])
def test_the_unrolled_gradient_tends_to_the_implicit_one(make):
    problem = make()
    cotangent = inputs(*problem.z0.shape, seed=7)
    x = problem.context[0].clone().requires_grad_()
    rest = problem.context[1:]
    grads = []
    for adjoint in ("unrolled", "implicit"):
        solution = tw.fix(
            problem.f, problem.z0, x, *rest, solver="auto", adjoint=adjoint, tol=1e-12, max_iter=300
        )
        grads.append(torch.autograd.grad((solution.value * cotangent).sum(), [*problem.parameters, x]))
    for a, b in zip(*grads, strict=True):
        assert problems.relative(a, b) < 1e-7


@pytest.mark.parametrize("memory", [0, -1, 2.5, True])
def test_bad_options(memory):
    with pytest.raises(tw.OptionError, match="memory of solver 'auto'"):
        tw.solver("auto", memory=memory)


def test_the_smallest_memory_works():
    solution = solve(slow(), tw.solver("auto", memory=1))
    assert bool(solution.converged.all())
