"""fix: solutions, statuses, rows that leave, and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import twnn_plugin as tw
from tests import problems
from tests.methods import NATIVE

f64 = torch.float64


def tanh_map(z, x):
    return torch.tanh(0.5 * z + x)


@pytest.mark.parametrize("solver", NATIVE)
@pytest.mark.parametrize("make", problems.ALL)
def test_solves_to_the_tolerance_it_reports(solver, make):
    problem = make()
    solution = tw.fix(problem.f, problem.z0, *problem.context, solver=solver, tol=1e-10, max_iter=1000)
    assert bool(solution.converged.all()), solution.describe()
    value = solution.value.detach()
    image = problem.f(value, *problem.context).detach()
    true = (image - value).norm(dim=1) / image.norm(dim=1)
    assert bool((true <= 1e-10).all())
    assert torch.allclose(true, solution.residual, rtol=1e-2, atol=1e-14)
    exact, _, _ = problems.reference(problem, torch.ones_like(value))
    assert torch.allclose(value, exact, atol=1e-7)


@pytest.mark.parametrize("solver", NATIVE)
def test_easy_rows_take_fewer_steps_and_leave(solver):
    problem = problems.mixed(batch=20)
    with torch.no_grad():
        solution = tw.fix(problem.f, problem.z0, *problem.context, solver=solver, tol=1e-8, max_iter=1000)
    steps = solution.steps.tolist()
    assert steps[0] < steps[-1]
    # Rows leave: far fewer evaluations than if all had stayed to the end.
    assert solution.evaluations < 0.8 * max(steps) * 20
    assert solution.evaluations >= sum(steps)


def test_evaluations_count_the_rows_that_ran():
    seen = []

    def f(z, x):
        seen.append(z.shape[0])
        return tanh_map(z, x)

    x = torch.linspace(-3, 3, 16)[:, None].repeat(1, 4)
    with torch.no_grad():
        solution = tw.fix(f, torch.zeros(16, 4), x, solver="picard", tol=1e-6, max_iter=100)
    assert solution.evaluations == sum(seen)
    assert len(seen) == int(solution.steps.max())


def test_without_context_no_row_leaves_and_closures_work():
    x = torch.linspace(-3, 3, 16)[:, None].repeat(1, 4)
    seen = []

    def f(z):
        seen.append(z.shape[0])
        return tanh_map(z, x)

    closed = tw.fix(f, torch.zeros(16, 4), solver="picard", tol=1e-6, max_iter=100)
    passed = tw.fix(tanh_map, torch.zeros(16, 4), x, solver="picard", tol=1e-6, max_iter=100)
    assert set(seen) == {16}
    assert torch.allclose(closed.value, passed.value, rtol=1e-6)
    assert torch.equal(closed.steps, passed.steps)


@pytest.mark.parametrize("solver", NATIVE)
def test_a_row_does_not_depend_on_its_batch_mates(solver):
    torch.manual_seed(0)
    w = 0.9 * torch.randn(16, 16) / 8
    x = torch.randn(24, 16)
    rate = torch.rand(24, 1)

    def f(z, x, rate):
        return torch.tanh(rate * (z @ w) + x)

    def solve(rows):
        with torch.no_grad():
            return tw.fix(
                f, torch.zeros(len(rows), 16), x[rows], rate[rows], solver=solver, tol=1e-5, max_iter=200
            )

    together = solve(list(range(24)))
    for row in range(0, 24, 5):
        alone = solve([row])
        assert problems.relative(together.value[row], alone.value[0]) < 1e-6
        assert int(together.steps[row]) == int(alone.steps[0])


@pytest.mark.parametrize("solver", NATIVE)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_changes_nothing_else(solver, poison):
    problem = problems.mixed()
    (x, rate), (w,) = problem.context, problem.parameters
    good = torch.arange(x.shape[0]) != 3

    def weight_gradient(x):
        solution = tw.fix(problem.f, problem.z0, x, rate, solver=solver, tol=1e-10, max_iter=500)
        (gradient,) = torch.autograd.grad((solution.value[good] ** 2).sum(), w)
        return solution, gradient

    clean, expected = weight_gradient(x)
    broken_x = x.clone()
    broken_x[3] = poison
    if poison == math.inf:
        # tanh(inf) is finite; let the map itself overflow.
        broken_x[3] = math.inf * torch.tensor([1.0, -1.0] * 4).double()
        broken_x[3, 0] = math.nan
    with pytest.warns(tw.ConvergenceWarning, match=r"\[3\]"):
        broken, gradient = weight_gradient(broken_x)
    assert broken.status[3] == tw.Status.non_finite
    assert bool(torch.isnan(broken.value[3]).any())
    assert torch.allclose(broken.value[good], clean.value[good], rtol=1e-12)
    assert torch.allclose(gradient, expected, rtol=1e-8)
    assert torch.equal(broken.steps[good], clean.steps[good])


def test_statuses():
    x = torch.ones(3, 2, dtype=f64)
    rate = torch.tensor([[0.1], [0.999], [1.9]], dtype=f64)
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(lambda z, x, r: r * z + x, 0 * x, x, rate, solver="picard", tol=1e-8, max_iter=80)
    assert [tw.Status(s) for s in solution.status.tolist()] == [
        tw.Status.converged,
        tw.Status.max_iter,
        tw.Status.diverged,
    ]
    assert "raise max_iter" in solution.describe() and "contraction" in solution.describe()


def test_the_error_names_every_row_that_failed():
    """Row by row while they are few, and in runs."""
    factors = torch.full((40, 1), 2.0)
    factors[[3, 20]] = 0.5
    with pytest.raises(tw.FixedPointError, match=r"38 row\(s\) \[0-2, 4-19, 21-39\]") as caught:
        tw.fix(lambda z, a: a * z + 1, torch.zeros(40, 1), factors, solver="picard", throw=True)
    assert caught.value.rows == tuple(i for i in range(40) if i not in (3, 20))
    with pytest.raises(tw.FixedPointError, match=r"2 row\(s\) \[3, 20\]"):
        tw.fix(lambda z, a: a * z + 1, torch.zeros(40, 1), 1 / factors, solver="picard", throw=True)


def test_stagnation_at_the_rounding_floor():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=generator)
    w = 0.98 * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(4, 64, generator=generator)
    with pytest.warns(tw.ConvergenceWarning, match="rounding floor"):
        solution = tw.fix(
            lambda z, x: torch.tanh(z @ w + x), 0 * x, x, solver="picard", tol=1e-12, max_iter=5000
        )
    failed = solution.status != int(tw.Status.converged)
    assert bool((solution.status[failed] == int(tw.Status.stagnated)).all())
    assert int(solution.steps.max()) < 5000


def test_throw_names_the_rows_and_keeps_the_solution():
    x = torch.ones(3, 2)
    rate = torch.tensor([[0.1], [3.0], [0.1]])
    with pytest.raises(tw.FixedPointError, match=r"1 of 3 rows.*\[1\]") as caught:
        tw.fix(lambda z, x, r: r * z + x, 0 * x, x, rate, throw=True, solver="picard")
    assert caught.value.solution.status[1] == tw.Status.diverged


def test_max_iter_one_makes_a_step():
    x = torch.ones(2, 3)
    with pytest.warns(tw.ConvergenceWarning):
        solution = tw.fix(tanh_map, torch.zeros(2, 3), x, max_iter=1)
    assert torch.equal(solution.value, torch.tanh(x))  # not the initial guess
    assert solution.steps.tolist() == [1, 1]


def test_empty_batch_and_a_batch_of_one():
    empty = tw.fix(tanh_map, torch.zeros(0, 3), torch.zeros(0, 3))
    assert empty.value.shape == (0, 3) and empty.evaluations == 0
    one = tw.fix(tanh_map, torch.zeros(1, 3), torch.ones(1, 3))
    assert bool(one.converged.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", NATIVE)
def test_dtypes_are_kept(dtype, solver):
    x = torch.linspace(-1, 1, 12).view(4, 3).to(dtype)
    solution = tw.fix(tanh_map, torch.zeros_like(x), x, solver=solver, tol=1e-2)
    assert solution.value.dtype == dtype
    assert bool(solution.converged.all())


def test_tuple_and_dict_states():
    x = torch.linspace(-1, 1, 12).view(4, 3)

    def pair(z, x):
        return torch.tanh(0.3 * z[1] + x), 0.5 * z[0].mean(1, keepdim=True).expand(4, 3) * 0.5

    with torch.no_grad():
        both = tw.fix(lambda z, x: pair(z, x), (0 * x, 0 * x), x, tol=1e-5, coupled=True)
        named = tw.fix(
            lambda z, x: dict(zip(("a", "b"), pair((z["a"], z["b"]), x), strict=True)),
            {"a": 0 * x, "b": 0 * x},
            x,
            tol=1e-5,
            coupled=True,
        )
    assert isinstance(both.value, tuple) and isinstance(named.value, dict)
    assert torch.equal(both.value[0], named.value["a"])


def test_coupled_rows_finish_together():
    mean = torch.tensor([[0.0], [4.0]])
    seen = []

    def f(z, x):
        seen.append(z.shape[0])
        return 0.5 * z.mean(0, keepdim=True) + x

    solution = tw.fix(f, torch.zeros(2, 1), mean, coupled=True, solver="picard", tol=1e-6, max_iter=100)
    assert set(seen) == {2} and len(set(solution.steps.tolist())) == 1
    assert torch.allclose(solution.value, f(solution.value, mean), atol=1e-4)


def test_norm_max_waits_for_the_slowest_position():
    # One position in 10,000 still moves: the l2 norm over all positions no longer sees it.
    target = torch.ones(1, 10_000)
    target[0, -1] = 2.0

    def f(z, t):
        step = torch.where(torch.arange(10_000) == 9_999, 0.05, 1.0)
        return z + step * (t - z)

    l2 = tw.fix(f, torch.zeros(1, 10_000), target, solver="picard", tol=1e-2, max_iter=500)
    largest = tw.fix(f, torch.zeros(1, 10_000), target, solver="picard", tol=1e-2, max_iter=500, norm="max")
    assert int(l2.steps) < 5 < int(largest.steps)
    assert abs(float(largest.value[0, -1]) - 2) < 0.3


def test_callback_sees_every_evaluation():
    seen = []
    x = torch.linspace(-3, 3, 8)[:, None]
    with torch.no_grad():
        solution = tw.fix(tanh_map, 0 * x, x, solver="picard", tol=1e-6, callback=seen.append)
    assert [i.step for i in seen] == list(range(1, int(solution.steps.max()) + 1))
    assert seen[-1].evaluations == solution.evaluations
    assert int(seen[0].rows.numel()) == 8 and int(seen[-1].rows.numel()) < 8


def test_broyden_is_bounded_by_its_memory_and_needs_few_evaluations():
    problem = problems.vector(batch=6, size=40, norm=0.98)
    counts = {}
    with torch.no_grad():
        for solver in ("picard", tw.solver("broyden", memory=3), tw.solver("broyden", memory=30)):
            solution = tw.fix(problem.f, problem.z0, *problem.context, solver=solver, tol=1e-8, max_iter=2000)
            assert bool(solution.converged.all())
            counts[getattr(solver, "memory", 0)] = solution.evaluations
    assert counts[30] <= counts[3] < counts[0]
    with pytest.raises(tw.OptionError, match="memory"):
        tw.solver("broyden", memory=0)


def test_a_non_contraction_that_anderson_solves():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=f64)
    with pytest.warns(tw.ConvergenceWarning):
        plain = tw.fix(lambda z, x: x - 1.5 * z, 0 * x, x, solver="picard")
    fast = tw.fix(lambda z, x: x - 1.5 * z, 0 * x, x, solver="anderson", tol=1e-10)
    assert bool((plain.status == int(tw.Status.diverged)).all() or (~plain.converged).all())
    assert torch.allclose(fast.value, x / 2.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "andersen"}, tw.UnknownNameError, "Did you mean 'anderson'"),
        ({"adjoint": "implicitt"}, tw.UnknownNameError, "Did you mean 'implicit'"),
        ({"tol": 0}, tw.OptionError, "positive"),
        ({"tol": -1e-3}, tw.OptionError, "positive"),
        ({"tol": math.nan}, tw.OptionError, "positive"),
        ({"max_iter": 0}, tw.OptionError, "at least 1"),
        ({"max_iter": 2.5}, tw.OptionError, "whole number"),
        ({"stop": "relative"}, tw.OptionError, "Did you mean 'rel'"),
        ({"norm": "l1"}, tw.OptionError, "l2"),
        ({"solver": 3}, tw.OptionError, "registered name"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        tw.fix(tanh_map, torch.zeros(2, 3), torch.zeros(2, 3), **options)


def test_misspelled_arguments_are_errors():
    with pytest.raises(TypeError, match="max_iters"):
        tw.fix(tanh_map, torch.zeros(2, 3), torch.zeros(2, 3), max_iters=3)
    with pytest.raises(tw.OptionError, match="Did you mean 'memory'"):
        tw.solver("anderson", memoy=3)
    with pytest.raises(tw.OptionError, match="memory"):
        tw.solver("anderson", memory=0)
    with pytest.raises(tw.OptionError, match="damping"):
        tw.solver("picard", damping=0)


def test_bad_maps_and_states():
    x = torch.zeros(2, 3)
    with pytest.raises(tw.MapError, match=r"\(2, 3\).*\(2, 4\)"):
        tw.fix(lambda z, x: torch.zeros(2, 4), x, x)
    with pytest.raises(tw.MapError, match="dtype"):
        tw.fix(lambda z, x: z.double(), x, x)
    with pytest.raises(tw.MapError, match="structure"):
        tw.fix(lambda z, x: (z, z), x, x)
    with pytest.raises(tw.MapError, match="2 rows"):
        tw.fix(tanh_map, x, torch.zeros(3, 3))
    with pytest.raises(tw.MapError, match="floating-point"):
        tw.fix(tanh_map, torch.zeros(2, 3, dtype=torch.long), x)
    with pytest.raises(tw.MapError, match="scalar"):
        tw.fix(tanh_map, torch.tensor(0.0), x)


def test_closing_over_the_batch_while_passing_context_says_what_to_do():
    x = torch.linspace(-3, 3, 16)[:, None].repeat(1, 4)
    with pytest.raises((tw.MapError, RuntimeError)):
        tw.fix(lambda z, y: tanh_map(z, x), torch.zeros(16, 4), x, tol=1e-6, solver="picard")


def test_solving_in_inference_mode_first_leaves_nothing_that_gradients_stumble_over():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    solver = tw.solver("anderson", start=0)
    with torch.inference_mode():
        tw.fix(lambda z, x: torch.tanh(0.9 * z + x), 0 * x, x, solver=solver, tol=1e-8)
    x.requires_grad_()
    solution = tw.fix(
        lambda z, x: torch.tanh(0.9 * z + x), 0 * x.detach(), x, solver=solver, tol=1e-8, adjoint="unrolled"
    )
    assert bool(torch.autograd.grad(solution.value.sum(), x)[0].any())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_anderson_on_states_no_larger_than_its_memory(size):
    """Differences that span the whole space once made it slower than plain iteration, and fail."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, size, generator=generator, dtype=torch.float64)
    rate = 0.98 * torch.rand(400, 1, generator=generator, dtype=torch.float64)
    solutions = [
        tw.fix(lambda z, x, r: torch.tanh(r * z + x), 0 * x, x, rate, solver=s, tol=1e-8, max_iter=900)
        for s in (tw.solver("anderson", memory=5), "picard")
    ]
    assert bool(solutions[0].converged.all())
    assert solutions[0].evaluations < solutions[1].evaluations


def test_one_overshoot_is_no_divergence():
    """A step of an accelerated method may land far out; the next plain one comes back."""

    @dataclass(frozen=True)
    class Leap(tw.solvers.StepSolver):
        """Plain iteration with one leap."""

        def init(self, z):
            return 0

        def step(self, problem, z, fz, r, state):
            return (fz + 1e9 if state == 2 else fz), state + 1

    x = torch.linspace(-1, 1, 6).view(3, 2)
    for every in (1, 4):
        solution = tw.fix(
            lambda z, x: torch.tanh(0.5 * z + x), 0 * x, x, solver=Leap(), tol=1e-5, check_every=every
        )
        assert bool(solution.converged.all())
    with pytest.warns(tw.ConvergenceWarning, match="diverged"):
        tw.fix(lambda z, x: 10 * z + x, 0 * x, x, solver="picard", max_iter=30)


def test_a_linear_solver_in_the_wrong_place_is_told_where_it_belongs():
    with pytest.raises(tw.UnknownNameError, match=r"adjoint=tw\.adjoint"):
        tw.fix(lambda z: z, torch.zeros(1, 1), solver="gcr")
