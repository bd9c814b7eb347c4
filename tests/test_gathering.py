"""Solvers that keep their past in a form of their own gather it themselves, whichever loop drives them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from twnn_plugin import Status

f64 = torch.float64
B, D = 17, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


class Past:
    """No tree of tensors: nobody but the solver can look into it."""

    def __init__(self, move: Tensor):
        self.move = move


@dataclass(frozen=True)
class HeavyBall(tw.solvers.StepSolver):
    """Momentum, whose past is kept row by row or otherwise.

    Args:
        form: of the past.
        beta: share of the last move.
        kept: what ``keep`` was asked for: rows before, and indices.
    """

    form: str = "rows"
    beta: float = 0.02
    kept: list[tuple[int, list[int]]] = field(default_factory=list, compare=False)

    def init(self, z: Tensor) -> Any:
        return self._packed(torch.zeros_like(z), 0)

    def step(self, problem, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        past, count = self._unpacked(state)
        move = r + self.beta * past
        return z + move, self._packed(move, count + 1)

    def keep(self, state: Any, rows: Tensor) -> Any:
        past, count = self._unpacked(state)
        self.kept.append((len(past), rows.tolist()))
        return self._packed(past.index_select(0, rows), count)

    def _packed(self, move: Tensor, count: int) -> Any:
        shared = torch.tensor(float(count), dtype=f64)  # of all rows: it has no row to gather
        forms = {
            "rows": lambda: (move, count),  # what is gathered without being asked for
            "columns": lambda: move.T.contiguous(),
            "blocks": lambda: {"halves": move.view(len(move), 2, D // 2).transpose(0, 1), "count": shared},
            "object": lambda: Past(move),
            "flat": lambda: (move.flatten(), shared),
        }
        return forms[self.form]()

    def _unpacked(self, state: Any) -> tuple[Tensor, int]:
        unpacked = {
            "rows": lambda: state,
            "columns": lambda: (state.T, 0),
            "blocks": lambda: (state["halves"].transpose(0, 1).flatten(1), int(state["count"])),
            "object": lambda: (state.move, 0),
            "flat": lambda: (state[0].view(-1, D), int(state[1])),
        }
        return unpacked[self.form]()


FORMS = ["columns", "blocks", "object", "flat"]
Q = torch.linalg.qr(drawn(D, D, seed=1))[0]
WEIGHT = Q @ torch.diag(torch.linspace(0.5, 0.9, D, dtype=f64)) @ Q.T
ORDER = torch.randperm(B, generator=torch.Generator().manual_seed(3))


def spread_out() -> tuple[Tensor, Tensor]:
    """Inputs and rates of rows that take from few to many steps, in no order, and one that fails."""
    x, rate = 0.1 * drawn(B, D, seed=2), torch.linspace(0, 1, B, dtype=f64)[ORDER][:, None]
    x[4] = float("nan")
    return x, rate


def solve(x: Tensor, rate: Tensor, form: str, every: int | None, weight: Tensor = WEIGHT, **options):
    solver = HeavyBall(form)
    options = {"tol": 1e-10, "max_iter": 120, "check_every": every, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(
            lambda z, c, rate: rate * torch.tanh(z @ weight) + c,
            torch.zeros_like(x),
            x,
            rate,
            solver=solver,
            **options,
        )
    return solution, solver.kept


@pytest.mark.parametrize("max_iter", [120, 32])
@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_form_of_the_past(form, max_iter):
    expected, _ = solve(*spread_out(), "rows", None, max_iter=max_iter)
    assert int(expected.status[4]) == Status.non_finite and expected.steps.unique().numel() >= 5
    assert bool((expected.status == Status.max_iter).any()) == (max_iter == 32)
    for every in (None, 1, 3, 5, 8):
        found, kept = solve(*spread_out(), form, every, max_iter=max_iter)
        assert torch.equal(found.status, expected.status), every
        assert torch.equal(found.steps, expected.steps), every
        torch.testing.assert_close(found.value, expected.value, rtol=1e-13, atol=1e-13, equal_nan=True)
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-3, atol=0.0, equal_nan=True)
        assert kept, every  # rows did leave
        for before, rows in kept:
            assert rows == sorted(set(rows)) and 0 < len(rows) < before and rows[-1] < before


@pytest.mark.parametrize("form", FORMS)
def test_unrolled_gradients_do_not_depend_on_it(form):
    x, rate = spread_out()
    x[4] = 0.1
    found = []
    for how in (("rows", None), (form, None), (form, 3), (form, 5)):
        w = WEIGHT.clone().requires_grad_()
        solution, kept = solve(x, rate, *how, weight=w, adjoint="unrolled")
        assert kept
        found.append(torch.autograd.grad(solution.value.square().sum(), w)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-10, atol=1e-10)
