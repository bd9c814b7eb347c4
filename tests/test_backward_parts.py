"""What backward passes owe each part of a state and each row, in their values and in their reports."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from tests.methods import BRIDGED
from twnn_plugin import Status

f64 = torch.float64
NAN = float("nan")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def quietly(f, z0, *context, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(f, z0, *context, **options)


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# A part of a state that is small, with weights of its own -------------------------------------------

X, W, SMALL = drawn(4, 6, seed=1), 0.1 * drawn(6, 6, seed=2), 1e-6
START = (torch.zeros(4, 6, dtype=f64), torch.zeros(4, 6, dtype=f64))


def branches(z, c, p):
    """The second part is a branch with a LayerScale: small and slow."""
    a, b = z
    return torch.tanh(a @ W + b + c), 0.9 * b + SMALL * torch.tanh(a) @ p


def iterated(p):
    z = START
    for _ in range(500):
        z = branches(z, X, p)
    return z


def settle(p, **options):
    return tw.fix(lambda z, c: branches(z, c, p), START, X, tol=1e-9, max_iter=1000, **options)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
@pytest.mark.parametrize("name", ["implicit", "ad_fixed_point"])
def test_the_gradient_of_a_small_part_meets_the_tolerance(name, solver, tol, coupled):
    adjoint = tw.adjoint(name, solver=solver, tol=tol)
    p = drawn(6, 6, seed=3).requires_grad_()
    (expected,) = torch.autograd.grad(iterated(p)[0].sum(), p)
    solution = settle(p, adjoint=adjoint, coupled=coupled)
    (found,) = torch.autograd.grad(solution.value[0].sum(), p)
    assert far(found, expected) < 4 * tol
    report = solution.adjoint
    assert report is not None and bool((report.status == Status.converged).all())
    assert bool((report.residual <= tol).all())
    transformed = torch.func.grad(lambda p: settle(p, adjoint=adjoint, coupled=coupled).value[0].sum())
    assert far(transformed(p.detach()), expected) < 4 * tol


@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
def test_second_derivatives_of_a_small_part(solver):
    adjoint, p = tw.adjoint("implicit", solver=solver, tol=1e-4), drawn(6, 6, seed=3)

    def slope(solve):
        return torch.func.grad(lambda p: solve(p)[0].square().sum())

    v = drawn(6, 6, seed=4)
    found, expected = (
        torch.func.grad(lambda p, solve=solve: (slope(solve)(p) * v).sum())(p)
        for solve in (lambda p: settle(p, adjoint=adjoint).value, iterated)
    )
    assert far(found, expected) < 2e-3


@pytest.mark.parametrize("solver", [None, "gcr"])
def test_tangents_that_a_small_part_drives(solver):
    adjoint, p = tw.adjoint("implicit", solver=solver, tol=1e-4), drawn(6, 6, seed=3)
    found, expected = (
        torch.func.jvp(lambda p, solve=solve: solve(p)[0], (p,), (drawn(6, 6, seed=4),))[1]
        for solve in (lambda p: settle(p, adjoint=adjoint).value, iterated)
    )
    assert far(found, expected) < 2e-3


class _Counted(torch.autograd.Function):
    """Counts the products with the Jacobian of what it is put into."""

    products = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        _Counted.products += 1
        return grads[0]


def spent(solver, second, loss_of) -> tuple[int, tw.AdjointReport]:
    """Products with the Jacobian of a map, and what was told of them.

    Args:
        solver: of the adjoint equation.
        second: of the value of the first part, to what drives the second part; None: there is none.
        loss_of: of the solution, to what is differentiated.
    """
    w = 0.3 * drawn(6, 6, seed=5)

    def f(z, c):
        a = _Counted.apply(torch.tanh(z[0] @ w + c))
        return (a,) if second is None else (a, 0.5 * z[1] + second(a))

    x = X.clone().requires_grad_()
    adjoint = tw.adjoint("implicit", solver=solver, tol=1e-6)
    start = START[:1] if second is None else START
    solution = tw.fix(f, start, x, tol=1e-10, max_iter=200, adjoint=adjoint)
    loss = loss_of(solution.value)
    _Counted.products = 0
    torch.autograd.grad(loss, x)
    report = solution.adjoint
    assert report is not None
    return _Counted.products, report


@pytest.mark.parametrize("solver", [None, "gcr", "picard", "bicgstab"])
def test_parts_of_which_nothing_can_be_known_cost_no_products(solver):
    products, one = spent(solver, None, lambda z: z[0].sum())
    assert products == int(one.steps.max()) + 1  # and one for the inputs
    for second, loss_of in (
        (lambda a: a, lambda z: z[0].sum()),  # which no gradient reaches
        (lambda a: 1e-30 * a, lambda z: z[0].sum() + 1e-200 * z[1].sum()),  # or none that a norm could see
    ):
        found, report = spent(solver, second, loss_of)
        assert found == products and report.evaluations == one.evaluations
        assert torch.equal(report.steps, one.steps) and torch.equal(report.status, one.status)


def test_states_of_one_part_are_solved_for_once():
    """Though the solution is shorter than what the tolerance refers to."""
    x = X.clone().requires_grad_()
    adjoint = tw.adjoint("implicit", solver="picard", tol=2.0**-20)
    solution = tw.fix(
        lambda z, c: -0.5 * z + c, torch.zeros_like(x), x, tol=1e-10, max_iter=60, adjoint=adjoint
    )
    solution.value.sum().backward()
    report = solution.adjoint
    assert report is not None and report.steps.tolist() == [20] * 4 and report.evaluations == 80


@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
def test_parts_near_rounding_are_no_failures(solver):
    for size in (1e-6, 1e-8, 1e-9, 1e-10, 1e-13):
        products, report = spent(solver, lambda a: a, lambda z, size=size: z[0].sum() + size * z[1].sum())
        assert bool((report.status == Status.converged).all()) and products < 120, size
        assert bool((report.residual <= 1e-6).all()), size


# Absolute tolerances --------------------------------------------------------------------------------


LARGE = 1e5 * drawn(5, 4, seed=6)


def linear(w, **options):
    options = {"stop": "abs", "tol": 5.0, "max_iter": 300, **options}
    return tw.fix(lambda z, c: z @ w + c, torch.zeros_like(LARGE), LARGE, **options)


def inverted(w):
    return torch.linalg.solve(torch.eye(4, dtype=f64) - w, LARGE, left=False)


@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
@pytest.mark.parametrize("name", ["implicit", "ad_fixed_point"])
def test_a_tolerance_in_units_of_the_state_is_none_for_gradients(name, solver):
    w, adjoint = 0.2 * drawn(4, 4, seed=7), tw.adjoint(name, solver=solver)

    def solved(w):
        return linear(w, adjoint=adjoint).value

    at = w.clone().requires_grad_()
    solution = linear(at, adjoint=adjoint)
    (found,) = torch.autograd.grad(solution.value.sum(), at)
    expected = torch.func.grad(lambda w: inverted(w).sum())(w)
    assert far(found, expected) < 3e-3
    assert solution.adjoint is not None and bool((solution.adjoint.residual <= 1e-3).all())
    assert far(torch.func.grad(lambda w: solved(w).sum())(w), expected) < 3e-3
    found, expected = (
        torch.func.hessian(lambda w, solve=solve: solve(w).square().sum())(w) for solve in (solved, inverted)
    )
    assert far(found, expected) < 1e-2


def test_tangents_by_an_absolute_tolerance():
    w, tangent = 0.2 * drawn(4, 4, seed=7), 1e-5 * drawn(4, 4, seed=9)
    found, expected = (
        torch.func.jvp(solve, (w,), (tangent,))[1] for solve in (lambda w: linear(w).value, inverted)
    )
    assert far(found, expected) < 3e-3


def test_tolerances_of_adjoints_are_those_that_were_asked_for():
    for tol, own, most in ((5.0, None, 1e-3), (1e-5, None, 1e-5), (5.0, 0.3, 0.3), (5.0, 5.0, 5.0)):
        at = (0.2 * drawn(4, 4, seed=7)).requires_grad_()
        solution = linear(at, tol=tol, adjoint=tw.adjoint("implicit", solver="picard", tol=own))
        solution.value.sum().backward()
        assert solution.adjoint is not None
        assert most / 20 < float(solution.adjoint.residual.max()) <= most


# What is reported -----------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint, steps", [("one_step", 1), ("phantom", 4), ("phantom", 2)])
@pytest.mark.parametrize("bad", [[1], [0, 3], [0, 1, 2]])
def test_adjoints_of_few_steps_name_the_rows_that_they_leave_out(adjoint, steps, bad):
    x = drawn(4, 6, seed=8)
    x[bad] = NAN
    x.requires_grad_()
    method = tw.adjoint(adjoint) if adjoint == "one_step" else tw.adjoint(adjoint, steps=steps)
    solution = quietly(lambda z, c: torch.tanh(z @ W + c), torch.zeros_like(x), x, adjoint=method)
    good = [row for row in range(4) if row not in bad]
    solution.value[good].sum().backward()
    report = solution.adjoint
    assert report is not None and not report.exact
    assert report.status.tolist() == [Status.non_finite if row in bad else 0 for row in range(4)]
    assert report.steps.tolist() == [0 if row in bad else steps for row in range(4)]
    assert report.evaluations == steps * len(good)
    assert all(math.isnan(r) for r in report.residual.tolist())


# What belongs to the caller -------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
@pytest.mark.parametrize("case", ["rests at its start", "returns its context", "expands a row"])
def test_values_that_are_unrolled_have_memory_of_their_own(case, adjoint):
    h = torch.zeros(3, 2, dtype=f64, requires_grad=True)
    start, c = 1.0 * h, 1.0 * h
    row = torch.ones(1, 2, dtype=f64, requires_grad=True)
    maps = {
        "rests at its start": lambda z, c: 0.5 * z,
        "returns its context": lambda z, c: c,
        "expands a row": lambda z, c: row.expand(3, 2),
    }
    value = tw.fix(maps[case], start, c, adjoint=adjoint, solver="picard").value
    before = value.detach().clone()
    value[0].add_(1.0)
    assert torch.equal(start, torch.zeros_like(start)) and torch.equal(c, torch.zeros_like(c))
    assert torch.equal(row, torch.ones_like(row)) and torch.equal(value[1:], before[1:])
    value.sum().backward()
    assert h.grad is not None or row.grad is not None


@pytest.mark.parametrize("solver", BRIDGED)
def test_loops_that_write_in_place_say_what_to_use_under_transforms(solver):
    def solve(c, adjoint):
        f, start = (lambda z, c: 0.5 * torch.tanh(z) + c), torch.zeros(3, 2, dtype=f64)
        return tw.fix(f, start, c, solver=solver, adjoint=adjoint, tol=1e-8, max_iter=60).value.sum()

    c = torch.ones(3, 2, dtype=f64)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(tw.TransformError, match=r"in place.*adjoint='implicit'"):
            transform(lambda c: solve(c, "unrolled"))(c)
        transform(lambda c: solve(c, "implicit"))(c)
    at = c.clone().requires_grad_()
    solve(at, "unrolled").backward()  # where the transform has ended, all is as before
    torch.testing.assert_close(at.grad, torch.func.grad(lambda c: solve(c, "implicit"))(c))


def test_a_tangent_does_not_stop_at_the_absolute_tolerance_of_the_state():
    generator = torch.Generator().manual_seed(0)
    weight = 0.2 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x = 1e5 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    direction = 1e-5 * torch.randn(4, 4, generator=generator, dtype=torch.float64)

    def solved(w, **options):
        options = {"max_iter": 300, "adjoint": "ad_fixed_point", **options}
        return tw.fix(lambda z, c: z @ w + c, torch.zeros_like(x), x, **options).value

    _, found = torch.func.jvp(lambda w: solved(w, stop="abs", tol=5.0), (weight,), (direction,))
    _, expected = torch.func.jvp(lambda w: solved(w, tol=1e-12), (weight,), (direction,))
    assert float((found - expected).norm()) < 3e-3 * float(expected.norm())


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_a_small_part_is_as_right_in_float32(tol):
    """In the units of the states rounding in the large part would drown it."""
    generator = torch.Generator().manual_seed(0)
    weight, small, x = (torch.randn(n, 6, generator=generator) for n in (6, 6, 4))
    weight, small = 0.1 * weight, (1e-6 * small).requires_grad_()

    def f(state, c):
        a, b = state
        return torch.tanh(a @ weight + b + c), 0.95 * b + torch.tanh(a) @ small

    state = start = (torch.zeros(4, 6), torch.zeros(4, 6))
    for _ in range(600):
        state = f(state, x)
    (expected,) = torch.autograd.grad(state[0].sum(), small)
    adjoint = tw.adjoint("implicit", tol=tol)
    solution = tw.fix(f, start, x, tol=1e-5, max_iter=1000, adjoint=adjoint)
    (found,) = torch.autograd.grad(solution.value[0].sum(), small)
    assert float((found - expected).norm()) < (3 * tol + 1e-4) * float(expected.norm())
    assert bool((solution.adjoint.status == Status.converged).all())


# Rows whose cotangents have no size ------------------------------------------------------------------


@pytest.mark.parametrize("cotangent", [NAN, math.inf, 1e300])
@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
def test_a_cotangent_without_a_size_changes_no_other_row(solver, cotangent):
    p, x = drawn(6, 6, seed=3), X.clone().requires_grad_()

    def gradient(first):
        adjoint = tw.adjoint("implicit", solver=solver, tol=1e-2)
        solution = tw.fix(lambda z, c: branches(z, c, p), START, x, tol=1e-9, max_iter=1000, adjoint=adjoint)
        g = torch.ones(4, 6, dtype=f64)
        g[0] = first
        (found,) = torch.autograd.grad(solution.value[0], x, g)
        assert solution.adjoint is not None
        return found[1:], solution.adjoint

    (expected, _), (found, report) = gradient(1.0), gradient(cotangent)
    assert bool((report.status[1:] == Status.converged).all())
    assert far(found, expected) < 1e-6  # what they would be off by without an attempt of their own: 6e-3


@pytest.mark.parametrize("transformed", [False, True])
def test_a_part_too_large_for_its_norm_leaves_the_gradient_finite(transformed):
    """The row ran out of iterations, with a state that is finite and whose squares are not."""
    w = torch.tensor(0.5)
    big, start = torch.tensor([[1.0] * 4, [1e30] * 4]), (torch.zeros(2, 3), torch.zeros(2, 4))

    def loss(w, first):
        solution = quietly(
            lambda z, c, d: (w * z[0] + c, w * z[1] + d),
            start,
            first,
            big,
            max_iter=1,
            stop="abs",
            norm="max",
        )
        return solution.value[0].sum()

    first = torch.ones(2, 3)
    if transformed:
        gradients = torch.func.grad(loss, argnums=(0, 1))(w, first)
    else:
        given = (w.requires_grad_(), first.requires_grad_())
        gradients = torch.autograd.grad(loss(*given), given)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


@pytest.mark.parametrize("coupled", [False, True])
def test_an_attempt_for_a_part_that_leads_away_is_not_taken(coupled):
    """The second part's series diverges, which little shows of while it is small beside the first."""
    a = torch.tensor([0.5, 0.4, 0.3], dtype=f64)
    x, y = torch.ones(2, 3, dtype=f64, requires_grad=True), torch.full((2, 3), -0.1, dtype=f64)
    y.requires_grad_()
    solution = tw.fix(
        lambda z, x, y: (a * z[0] + x, 1.1 * z[1] + y),
        ((x / (1 - a)).detach(), (-10 * y).detach()),
        x,
        y,
        tol=1e-6,
        coupled=coupled,
        adjoint=tw.adjoint("implicit", solver="picard", tol=1e-2, max_iter=60),
    )
    g = torch.ones(2, 3, dtype=f64), torch.tensor([[1e-4], [0.0]], dtype=f64).expand(2, 3)
    u, v = torch.autograd.grad(solution.value, (x, y), g)
    assert solution.adjoint is not None
    assert solution.adjoint.status.tolist() == [Status.max_iter, Status.converged]
    rest = torch.cat([a * u + g[0] - u, 1.1 * v + g[1] - v], dim=1)
    assert bool((rest.norm(dim=1) <= 1e-2 * g[0].norm(dim=1)).all())  # as the attempt before had it
