"""Hostile inputs: every failure is reported, and nobody's row is anybody else's problem."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from tests.methods import BRIDGED, NATIVE

POISONS = (0.0, 1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf)

problem = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 7),
        "size": st.integers(1, 9),
        "seed": st.integers(0, 10_000),
        "norm": st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0, 1.5, 50.0]),
        "squash": st.booleans(),
        "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
        "poisons": st.lists(st.sampled_from(POISONS), max_size=4),
        "tol": st.sampled_from([1e-1, 1e-3, 1e-7]),
        "max_iter": st.sampled_from([1, 2, 3, 17, 60]),
        "stop": st.sampled_from(["rel", "abs"]),
        "norm_kind": st.sampled_from(["l2", "max"]),
    }
)


def build(p):
    generator = torch.Generator().manual_seed(p["seed"])
    w = torch.randn(p["size"], p["size"], generator=generator, dtype=torch.float64)
    w = (p["norm"] * w / torch.linalg.matrix_norm(w, 2)).to(p["dtype"])
    x = torch.randn(p["batch"], p["size"], generator=generator, dtype=torch.float64)
    for index, poison in enumerate(p["poisons"]):
        x[(3 * index) % p["batch"]] *= poison
    rate = torch.rand(p["batch"], 1, generator=generator, dtype=torch.float64) * 2
    x, rate = x.to(p["dtype"]), rate.to(p["dtype"])

    def f(z, x, rate):
        # Row by row, so that the arithmetic does not depend on the batch.
        product = (rate * z).unsqueeze(1).mul(w.T).sum(-1)
        return torch.tanh(product + x) if p["squash"] else product + x

    return f, torch.zeros_like(x), (x, rate)


def run(p, solver, f, z0, context):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(
            f,
            z0,
            *context,
            solver=solver,
            tol=p["tol"],
            max_iter=p["max_iter"],
            stop=p["stop"],
            norm=p["norm_kind"],
        )


@pytest.mark.parametrize("solver", [*NATIVE, *BRIDGED])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(p=problem)
def test_no_failure_goes_unreported(solver, p):
    f, z0, context = build(p)
    solution = run(p, solver, f, z0, context)
    assert solution.value.shape == z0.shape and solution.value.dtype == z0.dtype
    assert int(solution.steps.min()) >= 1 and int(solution.steps.max()) <= p["max_iter"]
    assert solution.evaluations >= int(solution.steps.sum())
    good = solution.converged
    # What is called converged is finite, and its residual, measured anew, is within the tolerance.
    z = solution.value[good].double()
    assert bool(torch.isfinite(z).all())
    assert bool((solution.residual[good] <= p["tol"] * (1 + 1e-6)).all())
    if p["dtype"] != torch.bfloat16 and bool(good.any()):
        image = f(solution.value, *context)[good].double()
        change = (image - z).norm(dim=1) if p["norm_kind"] == "l2" else (image - z).abs().amax(1)
        size = image.norm(dim=1) / (1 if p["norm_kind"] == "l2" else z.shape[1] ** 0.5)
        bound = p["tol"] * ((size + 1e-9) if p["stop"] == "rel" else torch.ones_like(size))
        rounding = 1e-5 * size if p["dtype"] == torch.float32 else 1e-12 * size
        assert bool((change <= bound * (1 + 1e-5) + rounding).all())
    # A row that holds NaN or infinity in its input and cannot squash it away is never "converged".
    if not p["squash"]:
        broken = ~torch.isfinite(context[0]).all(dim=1)
        assert not bool(good[broken].any())


@pytest.mark.parametrize("solver", NATIVE)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=problem)
def test_a_row_alone_is_the_row_in_company(solver, p):
    f, z0, context = build(p)
    together = run(p, solver, f, z0, context)
    row = p["seed"] % p["batch"]
    alone = run(p, solver, f, z0[row : row + 1], tuple(c[row : row + 1] for c in context))
    assert together.status[row] == alone.status[0]
    assert together.steps[row] == alone.steps[0]
    assert torch.allclose(together.value[row], alone.value[0], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("adjoint", tw.adjoints.names())
@settings(max_examples=60, deadline=None, derandomize=True)
@given(p=problem)
def test_a_gradient_is_finite_where_only_good_rows_are_looked_at(adjoint, p):
    f, z0, (x, rate) = build(p)
    x = x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(
            f, z0, x, rate, adjoint=adjoint, tol=p["tol"], max_iter=p["max_iter"], stop=p["stop"]
        )
    good = solution.converged
    if not bool(good.any()) or not solution.value.requires_grad:
        return
    (gradient,) = torch.autograd.grad(solution.value[good].double().square().sum(), x)
    assert gradient.shape == x.shape
    assert bool(torch.isfinite(gradient[good]).all()) or p["norm"] > 1 or p["dtype"] == torch.bfloat16
