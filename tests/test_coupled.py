"""Rows that hear of each other: one equation, forward and backward, even where one of its rows fails."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from twnn_plugin import Status

f64 = torch.float64
NAN = float("nan")
TOL = 1e-9
KRYLOV = ["gcr", "gmres", "bicgstab", "neumann", "auto"]
STEPS = [None, "picard", "anderson", "broyden", "newton_krylov"]
FORWARD = ["picard", "anderson", "broyden", "newton_krylov", "auto", "torchdeq.fixed_point_iter"]
ADJOINTS = ["unrolled", "checkpointed", "implicit", "ad_fixed_point", "phantom", "one_step"]
SOUND = [0, 1, 3, 4]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


WEIGHT = 0.2 * drawn(5, 5)
MIX = 0.2 * drawn(5, 5, seed=3).abs()


def quietly(f, z0, *context, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(f, z0, *context, coupled=True, **options)


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found - expected).norm() <= bound * expected.norm()


# Gradients of losses that do not weigh all rows alike -----------------------------------------------


def through_the_mean(z: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(z @ WEIGHT + 0.5 * z.mean(0, keepdim=True) + c)


def iterated(c: Tensor) -> Tensor:
    z = torch.zeros_like(c)
    for _ in range(120):
        z = through_the_mean(z, c)
    return z


def solved(c: Tensor, adjoint) -> tw.Solution:
    return quietly(through_the_mean, torch.zeros_like(c), c, tol=TOL, max_iter=300, adjoint=adjoint)


def weights(kind: str) -> Tensor:
    w = drawn(4, 5, seed=2)
    rows = {
        "labelled": [1 / 32, 1 / 32, 0.0, 0.0],
        "one": [0.0, 3.0, 0.0, 0.0],
        "scales": [1e-20, 1e-3, 1.0, 1e3],
        "unsquarable": [1.0, 1.0, 1e-180, 0.0],
    }[kind]
    return w * torch.tensor(rows, dtype=f64)[:, None]


@pytest.mark.parametrize(
    "kind, solver",
    [
        *itertools.product(["labelled", "one", "unsquarable"], [*STEPS, *KRYLOV]),
        *(("scales", solver) for solver in (None, "picard", "newton_krylov")),
    ],
)
def test_losses_that_leave_rows_out(kind, solver):
    """A row without a gradient of its own has one through the others: it is not in units of its own."""
    w, c = weights(kind), drawn(4, 5, seed=1).requires_grad_()
    solution = solved(c, tw.adjoint("implicit", solver=solver))
    (found,) = torch.autograd.grad((solution.value * w).sum(), c)
    (expected,) = torch.autograd.grad((iterated(c) * w).sum(), c)
    assert_close(found, expected, 1e2 * TOL)
    report = solution.adjoint
    assert report is not None and report.status.tolist() == [Status.converged] * 4
    assert bool((report.residual <= TOL).all())
    assert int(report.steps.max()) <= (40 if solver in ("picard", "neumann") else 30)


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_jacobians_of_outputs_of_different_sizes(adjoint):
    w, c = weights("labelled") + weights("one"), drawn(4, 5, seed=1)
    expected = torch.func.jacrev(lambda c: w * iterated(c))(c)
    assert_close(torch.func.jacrev(lambda c: w * solved(c, adjoint).value)(c), expected, 1e-6)
    assert_close(torch.func.jacfwd(lambda c: w * solved(c, adjoint).value)(c), expected, 1e-6)


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_second_derivatives_of_a_loss_that_leaves_rows_out(adjoint):
    w, c = weights("labelled"), drawn(4, 5, seed=1)
    found, expected = (
        torch.func.hessian(lambda c, solve=solve: (w * solve(c) ** 2).sum())(c)
        for solve in (lambda c: solved(c, adjoint).value, iterated)
    )
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("changed", [[1.0, -3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1e-6, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("solver", [None, "gcr", "picard"])
def test_a_warm_start_is_near_for_all_rows_or_for_none(solver, changed):
    adjoint = tw.adjoint("implicit", solver=solver, warm_start=True)
    first = drawn(4, 5, seed=2)
    for w in (first, first * torch.tensor(changed, dtype=f64)[:, None]):
        c = drawn(4, 5, seed=1).requires_grad_()
        solution = solved(c, adjoint)
        (found,) = torch.autograd.grad((solution.value * w).sum(), c)
        (expected,) = torch.autograd.grad((iterated(c) * w).sum(), c)
        assert_close(found, expected, 1e2 * TOL)
        assert solution.adjoint is not None and bool((solution.adjoint.residual <= TOL).all())


# One row fails --------------------------------------------------------------------------------------


def late(z: Tensor, c: Tensor, slope: float = 0.5) -> Tensor:
    """Row 0 rests until row 1 has come far; rows 2 and up are on their own."""
    return torch.cat([torch.relu(z[1:2] - 50) + 1, 0.98 * z[1:2] + 2, slope * z[2:]]) + c


def meaned(z: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(0.5 * z + 0.4 * z.nan_to_num().mean(0)) + c


def averaged(z: Tensor, c: Tensor) -> Tensor:
    """Of the rows that are numbers."""
    return torch.tanh(0.5 * z + 0.4 * z.nanmean(0)) + c


def mixed(z: Tensor, c: Tensor) -> Tensor:
    """Of a fixed number of rows."""
    return torch.tanh(MIX @ z.nan_to_num()) + c


def with_a_failure() -> Tensor:
    c = drawn(5, 2, seed=4)
    c[2] = NAN
    return c


def residual(f, solution, c) -> Tensor:
    with torch.no_grad():
        fz = f(solution.value, c)
        return (fz - solution.value).norm(dim=1) / fz.norm(dim=1)


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize(
    "f, solver",
    [
        *itertools.product([late, meaned, mixed], FORWARD),
        # torchdeq is given finite states alone, and the last one of a row that has failed.
        *((averaged, solver) for solver in FORWARD if not solver.startswith("torchdeq.")),
    ],
)
def test_no_row_leaves_early_because_another_one_is_not_finite(f, solver, every):
    c = with_a_failure()
    if f is late:
        c = torch.where(c.isnan(), c, 0.1)
    with torch.no_grad():
        start = torch.zeros_like(c)
        solution = quietly(f, start, c, solver=solver, check_every=every, tol=1e-3, max_iter=400)
    assert solution.status.tolist() == [0, 0, Status.non_finite, 0, 0]
    assert solution.steps[SOUND].unique().numel() == 1 and int(solution.steps[2]) == 1
    true = residual(f, solution, c)[SOUND]
    assert bool((true <= 1e-3).all())
    torch.testing.assert_close(solution.residual[SOUND], true, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("solver", ["picard", "torchdeq.fixed_point_iter"])
def test_no_row_leaves_early_because_another_one_diverged(solver, every):
    def f(z, c):
        return late(z, c, slope=3.0)

    c = torch.tensor([[0.0], [0.0], [1.0]], dtype=f64)
    with torch.no_grad():
        start = torch.zeros_like(c)
        solution = quietly(f, start, c, solver=solver, check_every=every, tol=1e-3, max_iter=400)
    assert solution.status.tolist() == [0, 0, Status.diverged]
    assert bool((residual(f, solution, c)[:2] <= 1e-3).all())


@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("solver", ["picard", "torchdeq.fixed_point_iter"])
def test_a_row_that_stagnated_neither_lets_others_go_nor_holds_them_up(solver, every):
    def f(z, c):
        heard = torch.relu(z[1:2] - 30)  # row 0 rests for 30 steps, row 1 counts them
        flickers = 1 + 1e-14 * (z[2:] <= 1).to(z)
        return torch.cat([1 + heard, (z[1:2] + 1).clamp(max=40), flickers]) + c

    c = torch.zeros(3, 1, dtype=f64)
    with torch.no_grad():
        start = torch.zeros_like(c)
        solution = quietly(f, start, c, solver=solver, check_every=every, tol=1e-15, max_iter=100)
    assert solution.status.tolist() == [0, 0, Status.stagnated]
    assert solution.value[:2].flatten().tolist() == [11.0, 40.0]
    assert solution.steps.tolist() == [42, 42, 20]


@pytest.mark.parametrize("every", [None, 5])
def test_what_others_hear_of_a_diverged_row_is_the_value_that_is_handed_out(every):
    def f(z, c):
        # Row 0 hears row 1, which moves long after row 2, whom it hears too, has diverged.
        return torch.cat([0.5 * torch.sin(z[1:2] + z[2:]), 0.98 * z[1:2] + 2, 3.0 * z[2:]]) + c

    c = torch.tensor([[0.0], [0.0], [1.0]], dtype=f64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            options = {"solver": "picard", "adjoint": "unrolled", "check_every": every}
            solution = quietly(f, torch.ones_like(c), c, tol=1e-6, max_iter=2000, **options)
        assert solution.status.tolist() == [0, 0, Status.diverged]
        assert bool((residual(f, solution, c)[:2] <= 1e-6).all())


@pytest.mark.parametrize("start", [torch.zeros(5, 2, dtype=f64), drawn(5, 2, seed=6)], ids=["zero", "drawn"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "newton_krylov", "auto"])
@pytest.mark.parametrize("f", [meaned, mixed, averaged])
def test_values_are_those_of_the_whole_batch_whatever_the_adjoint(f, solver, start):
    c, sizes = with_a_failure(), set()

    def watched(z, c):
        sizes.update((z.shape[0], c.shape[0]))
        return f(z, c)

    def solve(adjoint, grad):
        with torch.set_grad_enabled(grad):
            at = c.clone().requires_grad_(grad)
            return quietly(watched, start, at, solver=solver, adjoint=adjoint, tol=1e-8, max_iter=200)

    expected = solve("unrolled", False)
    assert expected.status.tolist() == [0, 0, Status.non_finite, 0, 0]
    for adjoint in ADJOINTS:
        for grad in (False, True):
            found = solve(adjoint, grad)
            assert torch.equal(found.status, expected.status), adjoint
            assert torch.equal(found.steps, expected.steps), adjoint
            torch.testing.assert_close(
                found.value, expected.value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=adjoint
            )
    assert sizes == {5}


@pytest.mark.parametrize("start", [torch.zeros(5, 2, dtype=f64), drawn(5, 2, seed=6)], ids=["zero", "drawn"])
@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point", "unrolled", "checkpointed"])
def test_gradients_are_those_of_the_whole_batch(adjoint, start):
    """The failed row is zero to the others, and stays so in the backward pass."""
    c, v = with_a_failure(), 0.4 * drawn(2, 2, seed=5)

    def f(z, c, v):
        return torch.tanh(MIX @ z.nan_to_num() @ v) + c

    def gradients(solve):
        at, w = c.clone().requires_grad_(), v.clone().requires_grad_()
        return torch.autograd.grad(solve(at, w)[SOUND].square().sum(), (at, w))

    def iterated(c, v):
        z = torch.zeros_like(c)
        for _ in range(60):
            z = f(z, c, v)
        return z

    def solved(c, v):
        options = {"adjoint": adjoint, "tol": 1e-10, "max_iter": 200}
        return quietly(lambda z, c: f(z, c, v), start, c, **options).value

    for found, expected in zip(gradients(solved), gradients(iterated), strict=True):
        assert_close(found, expected, 1e-7)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("start", [torch.zeros(5, 2, dtype=f64), drawn(5, 2, seed=6)], ids=["zero", "drawn"])
@pytest.mark.parametrize("adjoint", ["unrolled", "checkpointed"])
def test_a_weight_that_meets_the_failed_row_has_a_gradient(adjoint, start):
    c, v = with_a_failure(), 0.4 * drawn(2, 2, seed=5)

    def gradient(f, solve):
        w = v.clone().requires_grad_()
        return torch.autograd.grad(solve(lambda z, c: f(z, c, w))[SOUND].square().sum(), w)[0]

    def f(z, c, w):
        return torch.tanh(0.5 * z @ w + 0.4 * z.nan_to_num().mean(0)) + c

    def looped(f):
        z = start
        for _ in range(100):
            z = f(z, c)
        return z

    found = gradient(f, lambda f: quietly(f, start, c, adjoint=adjoint, tol=1e-11, max_iter=300).value)
    assert_close(found, gradient(lambda z, c, w: f(z.nan_to_num(), c, w), looped), 1e-8)


@pytest.mark.parametrize("adjoint, steps, damping", [("one_step", 1, 1.0), ("phantom", 4, 0.5)])
def test_adjoints_of_few_steps_take_them_on_the_whole_batch(adjoint, steps, damping):
    c = with_a_failure().requires_grad_()
    solution = quietly(mixed, torch.zeros_like(c), c, adjoint=adjoint, tol=1e-8, max_iter=200)
    (found,) = torch.autograd.grad(solution.value[SOUND].sum(), c)
    z = solution.value.detach()
    for _ in range(steps):
        z = torch.lerp(z, mixed(z, c), damping)
    (expected,) = torch.autograd.grad(z[SOUND].sum(), c)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_torch_func_differentiates_the_batch_that_was_solved_for_though_a_row_failed(adjoint):
    generator = torch.Generator().manual_seed(0)
    mix = 0.2 * torch.rand(5, 5, generator=generator, dtype=f64)
    weight, x = (torch.randn(n, 2, generator=generator, dtype=f64) for n in (2, 5))
    x[2] = float("nan")

    def loss(w, how):
        def f(z, c):
            return torch.tanh(mix @ torch.nan_to_num(z) @ w) + c

        solution = quietly(f, torch.zeros_like(x), x, tol=1e-10, max_iter=200, adjoint=how)
        return solution.value[SOUND].sum()

    w = (0.4 * weight).requires_grad_()
    (expected,) = torch.autograd.grad(loss(w, "unrolled"), w)
    torch.testing.assert_close(torch.func.grad(loss)(w.detach(), adjoint), expected, rtol=1e-6, atol=1e-9)
