"""Broyden's method by compiled kernels, alone and in ``auto``: the steps of the operations of torch."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twnn_plugin as tw
from tests import problems
from tests.test_renewal import Batch
from twnn_plugin import kernels
from twnn_plugin.solvers.auto import Auto
from twnn_plugin.solvers.kelley_rows import AutoRows, BroydenRows
from twnn_plugin.solvers.newton_krylov import NewtonSteps
from twnn_plugin.streaming.methods import Cohorts, Renewing

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")

f64 = torch.float64


def both(f, z0, *context, **options):
    """A solve by the kernels, and by operations of torch."""

    def solve():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            return tw.fix(f, z0, *context, **options)

    one = solve()
    with kernels.disabled():
        return one, solve()


def assert_alike(one: tw.Solution, other: tw.Solution) -> None:
    assert int((one.steps - other.steps).abs().max()) <= 1  # rounding may move a row across the tolerance
    same = one.steps == other.steps
    assert torch.equal(one.status[same], other.status[same])
    assert torch.allclose(one.value[same], other.value[same], rtol=1e-6, atol=1e-8, equal_nan=True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 9),
    size=st.sampled_from([1, 2, 3, 7, 31, 32, 33, 70]),
    name=st.sampled_from(["broyden", "auto"]),
    memory=st.integers(1, 9),
    norm=st.sampled_from(["l2", "max"]),
    stop=st.sampled_from(["rel", "abs"]),
    seed=st.integers(0, 1000),
)
def test_they_take_the_same_steps(batch, size, name, memory, norm, stop, seed):
    p = problems.mixed(batch=batch, size=size, seed=seed)
    solver = tw.solver(name, memory=memory)
    options = {"tol": 1e-6, "max_iter": 40, "norm": norm, "stop": stop}
    assert_alike(*both(p.f, p.z0, *p.context, solver=solver, **options))


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_states_of_several_parts(solver, norm):
    p = problems.mixed(batch=9, size=12)

    def f(z, *context):
        a, b = p.f(torch.cat([z["a"], z["b"].flatten(1) / 1e3], dim=1), *context).split([4, 8], dim=1)
        return {"a": a, "b": 1e3 * b.view(-1, 2, 4)}

    start = {"a": p.z0[:, :4], "b": p.z0[:, 4:].view(-1, 2, 4)}
    one, other = both(f, start, *p.context, solver=solver, tol=1e-5, max_iter=60, norm=norm)
    assert int((one.steps - other.steps).abs().max()) <= 1 and bool(one.converged.all())
    for name in ("a", "b"):
        assert torch.allclose(one.value[name], other.value[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_rows_that_are_no_numbers_or_have_no_fixed_point(solver):
    x = draw(8, 5)
    x[1], x[2], x[3] = float("nan"), float("inf"), 1e300
    rate = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.8, 0.0, 1e200, 1.0], dtype=f64)[:, None]

    def f(z, x, rate):  # the last row travels for ever
        return torch.where(rate < 1, rate * z.roll(1, 1) + x, torch.where(rate > 1, rate * z * z + 1, z + 1))

    for most in (1, 2, 3, 50):
        one, other = both(f, 0 * torch.nan_to_num(x), x, rate, solver=solver, tol=1e-9, max_iter=most)
        assert_alike(one, other)
    S = tw.Status
    assert one.status[[0, 4, 5]].tolist() == [int(S.converged)] * 3
    assert one.status[[1, 2]].tolist() == [int(S.non_finite)] * 2
    assert not bool(one.converged[[6, 7]].any())


def test_rows_go_to_newtons_method_and_back(monkeypatch):
    """With one step of memory Broyden's method has no grip on a rotation that expands."""
    q, x = torch.linalg.qr(draw(10, 10, seed=3))[0], draw(5, 10)
    rate = torch.linspace(0.3, 1.5, 5, dtype=f64)[:, None]
    made = []
    plain = NewtonSteps.step

    def counted(self, problem, z, fz, r, state):
        made.append(len(z))
        return plain(self, problem, z, fz, r, state)

    monkeypatch.setattr(NewtonSteps, "step", counted)
    solver = tw.solver("auto", memory=1)
    one, other = both(lambda z, x, r: r * (z @ q) + x, 0 * x, x, rate, solver=solver, tol=1e-7, max_iter=250)
    assert len(made) > 50
    assert torch.equal(one.steps, other.steps) and torch.equal(one.status, other.status)
    assert torch.allclose(one.value, other.value, rtol=1e-6, atol=1e-6)
    assert one.steps[2] > 100 and bool(one.converged[:3].all())  # one that needed both


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_a_row_is_the_same_alone_and_among_others(solver, dtype):
    x = draw(40, 50).to(dtype)
    rate = torch.linspace(0.05, 0.97, 40, dtype=dtype)[:, None]
    x[7], x[8] = float("nan"), float("inf")

    def solve(pick):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            f = lambda z, x, rate: rate * torch.sin(z.roll(1, dims=1)) + x  # noqa: E731
            start = torch.zeros_like(x[pick])
            return tw.fix(f, start, x[pick], rate[pick], solver=solver, tol=1e-5, max_iter=200)

    whole = solve(slice(None))
    for row in (0, 3, 6, 9, 20, 39):
        alone = solve(slice(row, row + 1))
        assert torch.equal(alone.value[0], whole.value[row]) and alone.steps[0] == whole.steps[row]


@pytest.mark.parametrize("solver", ["broyden", "auto"])
def test_threads_share_rows_and_change_nothing(solver):
    x = draw(37, 4000).float()
    rate = torch.linspace(0.05, 0.9, 37)[:, None]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                f = lambda z, x, rate: rate * torch.sin(z.roll(1, dims=1)) + x  # noqa: E731
                found.append(tw.fix(f, torch.zeros_like(x), x, rate, solver=solver, tol=1e-4, max_iter=99))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].value, other.value) and torch.equal(found[0].steps, other.steps)


@pytest.mark.parametrize("kind", [Renewing, Cohorts])
@pytest.mark.parametrize("memory", [1, 3, 15])
def test_rows_that_come_and_go(memory, kind):
    solver = tw.solver("broyden", memory=memory).compiled()
    assert isinstance(solver, BroydenRows) and solver.renews
    batch = Batch(kind, solver)
    events = {4: batch.join, 5: batch.leave, 12: batch.join, 13: batch.leave}
    with torch.no_grad():
        for k in range(24):
            if k in events:
                events[k](2 if k in (4, 12) else [0, 3])
            batch.step([])


def test_rows_in_the_places_of_others_that_broke():
    batch = Batch(Renewing, tw.solver("broyden", memory=4).compiled())
    events = {1: [3], 2: [1], 3: [0, 4], 4: [0], 9: [5], 15: [0, 1, 2, 3, 4, 5], 16: [2]}
    with torch.no_grad():
        for k in range(24):
            if k in events:
                batch.replace(events[k])
            batch.step(events.get(k + 1, []))


def test_who_has_them():
    class Lazy(tw.solvers.get("broyden")):
        def step(self, problem, z, fz, r, state):
            return fz, state

    broyden = tw.solvers.get("broyden")
    assert type(Lazy().compiled()) is Lazy
    assert isinstance(broyden(memory=kernels.SLOTS).compiled(), BroydenRows)
    long = broyden(memory=kernels.SLOTS + 1)
    assert long.compiled() is long  # longer than the kernels' histories
    p = problems.mixed(batch=5, size=7)
    for name in ("broyden", "auto"):
        solver = tw.solver(name, memory=kernels.SLOTS + 1)
        assert_alike(*both(p.f, p.z0, *p.context, solver=solver, tol=1e-9, max_iter=99))


@pytest.mark.parametrize("memory", [2, kernels.SLOTS + 1])
def test_the_driver_asks_auto_for_them(memory, monkeypatch):
    seen = []
    plain = AutoRows.step

    def noted(self, *args):
        seen.append(self.memory)
        return plain(self, *args)

    monkeypatch.setattr(AutoRows, "step", noted)
    p = problems.mixed(batch=5, size=7)
    both(p.f, p.z0, *p.context, solver=Auto(memory=memory), tol=1e-9, max_iter=99)
    assert bool(seen) == (memory <= kernels.SLOTS)
