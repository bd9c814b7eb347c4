"""Broyden's method by its steps alone: the textbook's iterates, whatever the arithmetic of the products."""

from __future__ import annotations

import warnings

import pytest
import torch

import twnn_plugin as tw
from tests import problems
from twnn_plugin import kernels

f64 = torch.float64


def iterates(solver, problem, count):
    seen = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        tw.fix(
            problem.f,
            problem.z0,
            *problem.context,
            solver=solver,
            tol=1e-300,
            max_iter=count,
            callback=lambda it: seen.append(it.value.clone()),
        )
    return seen


def textbook(problem, count):
    """Broyden's first method for each row, with the matrix itself: B s = -F, B += (y - B s) s^T / (s^T s)."""
    z = problem.z0
    size, rows = z.shape[1], range(z.shape[0])
    eye = torch.eye(size, dtype=z.dtype)
    b = [-eye.clone() for _ in rows]
    residual = problem.f(z, *problem.context) - z
    seen = [z]
    for _ in range(count - 1):
        step = torch.stack([torch.linalg.solve(b[i], -residual[i]) for i in rows])
        z = z + step
        new = problem.f(z, *problem.context) - z
        for i in rows:
            miss = new[i] - residual[i] - b[i] @ step[i]
            b[i] = b[i] + torch.outer(miss, step[i]) / step[i].dot(step[i])
        residual = new
        seen.append(z)
    return seen


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_iterates_are_those_of_the_textbook(symmetric):
    problem = problems.vector(batch=5, size=20, norm=0.7, symmetric=symmetric)
    theirs = textbook(problem, 12)
    for ours, expected in zip(iterates("broyden", problem, 12), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_a_history_that_is_full_begins_anew_with_the_newest_step():
    problem = problems.vector(batch=5, size=20, norm=0.7)
    short, long = (iterates(tw.solver("broyden", memory=m), problem, 9) for m in (4, 15))
    for k in range(5):  # the fifth step is the first that four steps decide
        torch.testing.assert_close(short[k], long[k], rtol=0, atol=0)
    assert not torch.allclose(short[6], long[6])
    # One step kept: the secant method along the last step, in closed form.
    z = iterates(tw.solver("broyden", memory=1), problem, 6)
    for k in range(1, 5):
        r, s = problem.f(z[k], *problem.context) - z[k], z[k] - z[k - 1]
        share = (s * r).sum(1, keepdim=True) / (s * s).sum(1, keepdim=True)
        torch.testing.assert_close(z[k + 1] - z[k], r / (1 - share))


@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_coarse_matrix_products_of_the_user_do_not_reach_the_history(solver, monkeypatch):
    problem = problems.vector(batch=5, size=20, norm=0.9)
    weight, z0, x = (t.detach().float() for t in (problem.parameters[0], problem.z0, *problem.context))

    def f(z, x):
        return torch.tanh((z[:, :, None] * weight).sum(1) + x)  # no matrix product of its own

    expected = tw.fix(f, z0, x, solver=solver, tol=1e-6).value

    def refused(*args, **kwargs):
        raise AssertionError("a matrix product was made")

    monkeypatch.setattr(torch, "bmm", refused)
    monkeypatch.setattr(torch, "baddbmm", refused)
    with kernels.disabled():  # which make no products of matrices
        with pytest.raises(AssertionError, match="a matrix product"):
            tw.fix(f, z0, x, solver=solver, tol=1e-6)
        assert_coarse_products_change_nothing(solver, f, z0, x, expected)


def assert_coarse_products_change_nothing(solver, f, z0, x, expected):
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = tw.fix(f, z0, x, solver=solver, tol=1e-6).value
    torch.testing.assert_close(under_autocast, expected, rtol=1e-5, atol=1e-5)
    torch.set_float32_matmul_precision("high")
    try:
        coarse = tw.fix(f, z0, x, solver=solver, tol=1e-6).value
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(coarse, expected, rtol=1e-5, atol=1e-5)
