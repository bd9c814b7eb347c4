"""The solvers of an adjoint's linear equation: against dense algebra, row by row, and honest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from twnn_plugin.solvers.base import Control
from twnn_plugin.solvers.linear import LinearProblem

f64 = torch.float64
NAMES = tw.linear_solvers.names()
KRYLOV = [name for name in NAMES if name != "neumann"]  # these solve what the series cannot
EVERY_SETTING = [
    *((name, {}) for name in NAMES),
    ("gcr", {"memory": 2}),
    ("gmres", {"memory": 3}),
    ("auto", {"memory": 2}),
]


class Dense:
    """``J^T u`` with a (B, D, D) matrix; products may be rounded to a narrower dtype."""

    leave_share = 0.5

    def __init__(self, jacobian, can_leave=True, dtype=None, eps=None):
        self.jacobian = jacobian
        self.size = jacobian.shape[0]
        self.evaluations = 0
        self.can_leave = can_leave
        self.dtype = dtype
        self.eps = torch.finfo(dtype or jacobian.dtype).eps if eps is None else eps
        self.calls = []

    def product(self, u):
        assert u.shape == self.jacobian.shape[:2]
        self.evaluations += self.size
        self.calls.append(self.size)
        # One row at a time, so that the arithmetic does not depend on the batch.
        product = (self.jacobian * u[:, :, None]).sum(1)
        return product if self.dtype is None else product.to(self.dtype).to(u.dtype)

    def keep(self, rows):
        self.jacobian, self.size = self.jacobian[rows], rows.numel()


def matrices(rates, size=12, seed=0, symmetric=False, dtype=f64):
    """Jacobians of the given norms."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.as_tensor(rates, dtype=f64)
    w = torch.randn(len(rates), size, size, generator=generator, dtype=f64)
    w = (w + w.mT) / 2 if symmetric else w
    return (rates[:, None, None] * w / torch.linalg.matrix_norm(w, 2)[:, None, None]).to(dtype)


def vectors(batch, size=12, seed=1, dtype=f64):
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def true_residual(jacobian, g, u):
    g, u = g.double(), u.double()
    r = g + (jacobian.double() * u[:, :, None]).sum(1) - u
    return r.norm(dim=1) / g.norm(dim=1)


def run(name, jacobian, g, tol=1e-10, max_iter=400, options=None, **settings):
    control = Control(
        tol, max_iter, scale=settings.pop("scale", None), coupled=settings.pop("coupled", False)
    )
    problem: LinearProblem = Dense(jacobian, **settings)
    return tw.linear_solver(name, **(options or {})).solve(problem, g, control), problem


@pytest.mark.parametrize(("name", "options"), EVERY_SETTING)
@pytest.mark.parametrize("symmetric", [False, True])
def test_agrees_with_a_dense_solve_and_reports_the_true_residual(name, options, symmetric):
    jacobian, g = matrices([0.05, 0.5, 0.9, 0.95], symmetric=symmetric), vectors(4)
    outcome, problem = run(name, jacobian, g, max_iter=800, options=options)
    assert outcome.status.tolist() == [0] * 4
    for row in range(4):
        exact = torch.linalg.solve(torch.eye(12, dtype=f64) - jacobian[row].T, g[row])
        assert torch.allclose(outcome.value[row], exact, rtol=1e-7, atol=1e-8)
    true = true_residual(jacobian, g, outcome.value)
    assert bool((true <= 1e-10).all())
    assert torch.allclose(true, outcome.residual, rtol=1e-2, atol=1e-15)
    assert int(outcome.steps.sum()) <= problem.evaluations == sum(problem.calls)


@pytest.mark.parametrize("name", NAMES)
def test_easy_rows_leave(name):
    jacobian, g = matrices(torch.linspace(0.02, 0.97, 20) ** 2, size=40, symmetric=True), vectors(20, 40)
    outcome, problem = run(name, jacobian, g, max_iter=800)
    steps = outcome.steps.tolist()
    assert steps[0] < steps[-1]
    assert sum(steps) <= problem.evaluations < 0.8 * 20 * max(steps)
    stayed, problem = run(name, jacobian, g, max_iter=800, can_leave=False)
    assert set(problem.calls) == {20}
    assert torch.equal(stayed.steps, outcome.steps)
    assert torch.allclose(stayed.value, outcome.value, rtol=1e-12)


def test_products_a_row_spends():
    """Krylov methods are done within as many directions as the space has, and beat the series."""
    jacobian, g = matrices([0.97] * 5, size=10, symmetric=True), vectors(5, 10)
    steps = {name: int(run(name, jacobian, g, max_iter=3000)[0].steps.max()) for name in NAMES}
    assert steps["gcr"] <= 11 and steps["auto"] <= 12
    assert steps["gmres"] <= 12  # it measures what it has formed
    assert steps["bicgstab"] <= 26
    assert steps["neumann"] > 10 * steps["gcr"]


@pytest.mark.parametrize("name", NAMES)
def test_budget_and_statuses(name):
    jacobian, g = matrices([0.9] * 3), vectors(3)
    for most in (1, 2, 5):
        outcome, problem = run(name, jacobian, g, max_iter=most)
        assert len(problem.calls) == most
        assert outcome.status.tolist() == [int(tw.Status.max_iter)] * 3
        assert outcome.steps.tolist() == [most] * 3
        assert bool((outcome.residual > 1e-10).all())


@pytest.mark.parametrize("name", NAMES)
def test_zero_nan_and_infinite_rows(name):
    jacobian, g = matrices([0.5] * 6), vectors(6)
    clean, _ = run(name, jacobian, g)
    g[1] = 0
    g[3, 2] = math.nan
    g[4, 0] = -math.inf
    outcome, _ = run(name, jacobian, g)
    assert [tw.Status(s).name for s in outcome.status.tolist()] == [
        "converged",
        "converged",
        "converged",
        "non_finite",
        "non_finite",
        "converged",
    ]
    assert not bool(outcome.value[1].any()) and int(outcome.steps[1]) == 0
    assert bool(torch.isnan(outcome.residual[3:5]).all())
    good = [0, 2, 5]
    assert torch.allclose(outcome.value[good], clean.value[good], rtol=1e-12)
    assert torch.equal(outcome.steps[good], clean.steps[good])


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_jacobian_is_its_own_row_s_affair(name):
    jacobian, g = matrices([0.7] * 4), vectors(4)
    clean, _ = run(name, jacobian, g)
    jacobian[2] = math.nan
    outcome, _ = run(name, jacobian, g)
    assert outcome.status.tolist() == [0, 0, int(tw.Status.non_finite), 0]
    assert torch.equal(outcome.value[2], g[2])
    assert torch.equal(outcome.steps[[0, 1, 3]], clean.steps[[0, 1, 3]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_any_scale_of_the_gradient(name, dtype):
    jacobian, g = matrices([0.8] * 4, dtype=dtype), vectors(4, dtype=dtype)
    expected, _ = run(name, jacobian, g, tol=1e-4)
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        outcome, _ = run(name, jacobian, scale * g, tol=1e-4)
        assert torch.equal(outcome.status, expected.status)
        assert torch.equal(outcome.steps, expected.steps)
        assert torch.allclose(outcome.value / scale, expected.value, rtol=1e-3, atol=1e-4)
        assert outcome.value.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_given_scales_are_what_the_tolerance_is_relative_to(name):
    jacobian, g = matrices([0.8] * 3), vectors(3)
    scale = g.norm(dim=1) * torch.tensor([1.0, 1e-3, 1e3], dtype=f64)
    outcome, _ = run(name, jacobian, g, tol=1e-5, scale=scale)
    absolute = true_residual(jacobian, g, outcome.value) * g.norm(dim=1)
    assert bool((absolute <= 1e-5 * scale).all())
    assert torch.allclose(outcome.residual, absolute / scale, rtol=1e-2, atol=1e-12)
    assert int(outcome.steps[2]) < int(outcome.steps[0]) <= int(outcome.steps[1])


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch_and_a_batch_of_one(name):
    empty, problem = run(name, matrices([]), vectors(0))
    assert empty.value.shape == (0, 12) and problem.evaluations == 0
    one, _ = run(name, matrices([0.9]), vectors(1))
    assert one.status.tolist() == [0]


@pytest.mark.parametrize("name", KRYLOV)
def test_what_the_series_cannot_solve(name):
    """Eigenvalues near -1.2, and a Jacobian of norm 3 whose eigenvalues are imaginary."""
    negative = -1.2 * torch.diag(torch.linspace(0.3, 1, 12, dtype=f64))
    skew = matrices([1.0])[0]
    skew = 3 * (skew - skew.T) / torch.linalg.matrix_norm(skew - skew.T, 2)
    jacobian, g = torch.stack([negative, skew]), vectors(2)
    series, _ = run("neumann", jacobian, g)
    assert series.status.tolist() == [int(tw.Status.diverged)] * 2
    assert torch.equal(series.value, g)  # what it came to is worse than that
    outcome, _ = run(name, jacobian, g, tol=1e-9)
    assert outcome.status.tolist() == [0, 0]
    assert bool((true_residual(jacobian, g, outcome.value) <= 1e-9).all())


@pytest.mark.parametrize("name", KRYLOV)
def test_a_singular_equation_stagnates_soon_and_says_so(name):
    jacobian, g = matrices([0.5] * 3), vectors(3)
    jacobian[1] = torch.eye(12, dtype=f64)
    outcome, _ = run(name, jacobian, g)
    assert outcome.status.tolist() == [0, int(tw.Status.stagnated), 0]
    assert int(outcome.steps[1]) < 20
    assert bool(torch.isfinite(outcome.value).all())


def test_gcr_goes_on_where_it_breaks_down():
    """(r, A r) = 0 for a skew A: the residual gives no new direction, the newest product does."""
    skew = matrices([1.0] * 3, size=8)
    jacobian, g = torch.eye(8, dtype=f64) - (skew - skew.mT), vectors(3, 8)
    for name in ("gcr", "gmres", "auto"):
        outcome, _ = run(name, jacobian, g)
        assert outcome.status.tolist() == [0] * 3
        assert int(outcome.steps.max()) <= 10
    broken, _ = run("bicgstab", jacobian, g)  # may fail here, but not silently
    true = true_residual(jacobian, g, broken.value)
    assert bool((true[broken.status == 0] <= 1e-10).all())


def test_neumann_is_the_series_cut_where_asked():
    jacobian, g = matrices([0.9] * 3), vectors(3)
    term, total = g, g
    for _ in range(4):
        term = (jacobian * term[:, :, None]).sum(1)
        total = total + term
    outcome, problem = run("neumann", jacobian, g, options={"terms": 5})
    assert torch.allclose(outcome.value, total, rtol=1e-12)
    assert outcome.status.tolist() == [int(tw.Status.max_iter)] * 3 and len(problem.calls) == 5
    assert torch.allclose(outcome.residual, true_residual(jacobian, g, total), rtol=1e-10)
    enough, _ = run("neumann", matrices([1e-3] * 3), g, options={"terms": 5})
    assert enough.status.tolist() == [0] * 3


def test_auto_keeps_easy_rows_on_the_series_and_spends_no_more_than_gcr():
    jacobian, g = matrices([0.001, 0.01, 0.5, 0.9, 0.97]), vectors(5)
    chosen, gcr = (run(name, jacobian, g, tol=1e-5)[0] for name in ("auto", "gcr"))
    assert bool((chosen.steps <= gcr.steps + 1).all())
    easy = slice(0, 2)
    series, _ = run("neumann", jacobian[easy], g[easy], tol=1e-5)
    assert torch.equal(chosen.value[easy], series.value)
    assert torch.equal(chosen.steps[easy], series.steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_residual_that_has_drifted_is_not_believed(name):
    """Products rounded to bfloat16: the recurrence falls below any tolerance, the truth does not."""
    jacobian, g = matrices([0.98] * 6, size=30, symmetric=True, dtype=torch.float32), vectors(6, 30).float()
    options = {"tol": 4e-2, "max_iter": 200, "dtype": torch.bfloat16}
    honest, _ = run(name, jacobian, g, **options)
    measured = g + problem_product(jacobian, honest.value) - honest.value
    relative = measured.norm(dim=1) / g.norm(dim=1)
    good = honest.status == 0
    assert bool((relative[good] <= 4e-2 * 1.001).all())
    assert bool((honest.residual[good] <= 4e-2 * 1.001).all())


def problem_product(jacobian, u):
    return (jacobian * u[:, :, None]).sum(1).bfloat16().float()


def test_without_the_rounding_error_it_would_be_believed():
    """That the test above can fail: told that products are exact, GCR believes its recurrence."""
    jacobian, g = matrices([0.98] * 6, size=30, symmetric=True, dtype=torch.float32), vectors(6, 30).float()
    options = {"tol": 1e-3, "max_iter": 200, "dtype": torch.bfloat16}
    trusting, _ = run("gcr", jacobian, g, eps=0.0, **options)
    measured = (g + problem_product(jacobian, trusting.value) - trusting.value).norm(dim=1) / g.norm(dim=1)
    assert bool((measured[trusting.status == 0] > 1e-3).any())
    honest, _ = run("gcr", jacobian, g, **options)
    assert bool((honest.status == int(tw.Status.stagnated)).any())
    measured = (g + problem_product(jacobian, honest.value) - honest.value).norm(dim=1) / g.norm(dim=1)
    assert bool((measured[honest.status == 0] <= 1.001e-3).all())


hostile = st.fixed_dictionaries(
    {
        "rates": st.lists(st.sampled_from([0.0, 0.1, 0.9, 0.999, 1.0, 1.5, 5.0]), min_size=1, max_size=6),
        "size": st.integers(1, 12),
        "seed": st.integers(0, 1000),
        "kind": st.sampled_from(["any", "symmetric", "triangular"]),
        "scales": st.lists(st.sampled_from([1.0, 0.0, 1e-30, 1e30, math.nan, math.inf]), max_size=4),
        "dtype": st.sampled_from([torch.float32, f64]),
        "tol": st.sampled_from([1e-1, 1e-4, 1e-6]),
        "max_iter": st.sampled_from([1, 2, 7, 60]),
    }
)


def build(p):
    jacobian = matrices(p["rates"], p["size"], p["seed"], p["kind"] == "symmetric", p["dtype"])
    if p["kind"] == "triangular":  # far from normal
        jacobian = jacobian.triu()
    g = vectors(len(p["rates"]), p["size"], p["seed"] + 1, p["dtype"])
    for index, scale in enumerate(p["scales"]):
        g[(2 * index) % len(g)] *= scale
    return jacobian, g


@pytest.mark.parametrize(("name", "options"), EVERY_SETTING)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=hostile)
def test_no_row_is_called_converged_that_is_not(name, options, p):
    jacobian, g = build(p)
    outcome, problem = run(name, jacobian, g, p["tol"], p["max_iter"], options)
    assert int(outcome.steps.max()) <= p["max_iter"] and len(problem.calls) <= p["max_iter"]
    good = (outcome.status == 0) & g.any(dim=1)
    size = g[good].abs().amax(dim=1, keepdim=True)
    scaled, u = g[good] / size, outcome.value[good] / size
    assert bool(torch.isfinite(u).all())
    rounding = 32 * torch.finfo(p["dtype"]).eps * (u.norm(dim=1) / scaled.norm(dim=1)).double()
    true = true_residual(jacobian[good], scaled, u)
    assert bool((true <= p["tol"] + rounding).all())
    assert bool((outcome.status[~torch.isfinite(g).all(dim=1)] == int(tw.Status.non_finite)).all())


@pytest.mark.parametrize(("name", "options"), EVERY_SETTING)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(p=hostile)
def test_a_row_alone_is_the_row_in_company(name, options, p):
    jacobian, g = build(p)
    together, _ = run(name, jacobian, g, p["tol"], p["max_iter"], options)
    row = p["seed"] % len(g)
    one = slice(row, row + 1)
    alone, _ = run(name, jacobian[one], g[one], p["tol"], p["max_iter"], options)
    assert together.status[row] == alone.status[0]
    assert together.steps[row] == alone.steps[0]
    torch.testing.assert_close(together.value[one], alone.value, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_coupled_rows_are_one_system(name):
    """``J`` mixes the rows: weighed one by one, Krylov directions would be of no use."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(15, 15, generator=generator, dtype=f64)
    whole = 0.9 * whole / torch.linalg.matrix_norm(whole, 2)

    class Coupled(Dense):
        def product(self, u):
            self.evaluations += self.size
            return (u.reshape(-1) @ whole).view_as(u)

    g = vectors(3, 5)
    problem = Coupled(torch.zeros(3, 5, 5, dtype=f64))
    outcome = tw.linear_solver(name).solve(problem, g, Control(1e-10, 400, coupled=True))
    exact = torch.linalg.solve(torch.eye(15, dtype=f64) - whole.T, g.reshape(-1)).view(3, 5)
    assert outcome.status.tolist() == [0] * 3 and len(set(outcome.steps.tolist())) == 1
    assert torch.allclose(outcome.value, exact, atol=1e-8)
    assert problem.evaluations == 3 * int(outcome.steps[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gcr", {"memory": 0}),
        ("gmres", {"memory": 2.5}),
        ("auto", {"memory": True}),
        ("neumann", {"terms": 0}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(tw.OptionError, match=f"{next(iter(options))} of linear solver '{name}'"):
        tw.linear_solver(name, **options)
    with pytest.raises(tw.UnknownNameError, match="Did you mean 'gmres'"):
        tw.linear_solvers.registry.resolve("gmrs")
