"""The same results on a CUDA device, without host synchronisation in every evaluation."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import twnn_plugin as tw
from tests import problems
from tests.methods import NATIVE
from twnn_plugin.adjoints.equation import Equation
from twnn_plugin.solvers import Control, Outcome, StepSolver, driver
from twnn_plugin.state import Layout

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

STEP_SOLVERS = [name for name in NATIVE if isinstance(tw.solvers.registry.make(name), StepSolver)]


def moved(problem, device):
    """The problem's map with its tensors on a device: f, z0, context, weight."""
    (weight,) = problem.parameters
    w = weight.detach().to(device).requires_grad_()
    context = tuple(c.to(device) for c in problem.context)
    if problem.name == "affine":
        return (lambda z, x: z @ w + x), problem.z0.to(device), context, w
    if len(context) == 2:
        return (lambda z, x, rate: torch.tanh(rate * (z @ w) + x)), problem.z0.to(device), context, w
    return (lambda z, x: torch.tanh(z @ w + x)), problem.z0.to(device), context, w


def solve(solver, f, z0, context, control) -> tuple[Outcome, Equation]:
    layout, z = Layout.of(z0)
    equation = Equation(f, layout, context, z.shape[0])
    with torch.no_grad():
        return driver.solve(tw.solvers.registry.resolve(solver), equation, z, control), equation


def agree(a: Outcome, b: Outcome) -> None:
    assert torch.equal(a.status.cpu(), b.status.cpu())
    # The arithmetic differs between devices: a row may cross its tolerance an evaluation earlier.
    assert int((a.steps.cpu() - b.steps.cpu()).abs().max()) <= 1
    assert torch.allclose(a.value.cpu(), b.value.cpu(), rtol=1e-6, atol=1e-8, equal_nan=True)


def with_a_broken_row(solver) -> list[Outcome]:
    """Solutions of a batch whose row 3 has no number in its context: on the CPU, and on CUDA."""
    outcomes = []
    for device in ("cpu", "cuda"):
        f, z0, (x, rate), _ = moved(problems.mixed(), device)
        x = x.clone()
        x[3] = math.nan
        outcomes.append(solve(solver, f, z0, (x, rate), Control(1e-8, 400))[0])
    return outcomes


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("solver", STEP_SOLVERS)
@pytest.mark.parametrize("make", problems.ALL)
def test_solvers_agree_with_the_cpu(solver, make, graphs):
    control = Control(1e-9, 500)
    here, _ = solve(solver, *moved(make(), "cpu")[:3], control)
    there, _ = solve(solver, *moved(make(), "cuda")[:3], Control(1e-9, 500, cuda_graphs=graphs))
    agree(here, there)


@pytest.mark.parametrize("solver", NATIVE)
def test_every_solver_works_through_fix(solver):
    f, z0, context, _ = moved(problems.mixed(), "cuda")
    with torch.no_grad():
        solution = tw.fix(f, z0, *context, solver=solver, tol=1e-8, max_iter=1000)
    assert bool(solution.converged.all()) and solution.value.is_cuda


@pytest.mark.parametrize("adjoint", tw.adjoints.names())
def test_gradients_agree_with_the_cpu(adjoint):
    gradients = []
    for device in ("cpu", "cuda"):
        f, z0, context, w = moved(problems.mixed(), device)
        solution = tw.fix(f, z0, *context, adjoint=adjoint, tol=1e-10, max_iter=500)
        gradients.append(torch.autograd.grad(solution.value.square().sum(), w)[0].cpu())
    assert problems.relative(gradients[1], gradients[0]) < 1e-6


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_broken_rows_agree_with_the_cpu(solver):
    here, there = with_a_broken_row(solver)
    agree(here, there)
    assert there.status[3] == tw.Status.non_finite


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_the_host_waits_once_in_a_few_evaluations(solver):
    f, z0, context, _ = moved(problems.mixed(batch=32), "cuda")
    control = Control(1e-9, 500, check_every=5)
    solve(solver, f, z0, context, control)  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome, _ = solve(solver, f, z0, context, control)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert 0 < len(waits) <= math.ceil(int(outcome.steps.max()) / 5)


def test_graphs_are_replayed_instead_of_calling_f():
    calls = {True: 0, False: 0}
    for graphs in calls:
        w = 0.999 * torch.eye(8, device="cuda")

        def f(z, x, w=w, graphs=graphs):
            calls[graphs] += 1
            return z @ w + x

        x = torch.ones(4, 8, device="cuda")
        solve("picard", f, 0 * x, (x,), Control(1e-30, 400, cuda_graphs=graphs))
    assert calls[False] == 400 and calls[True] < 60


def test_a_map_that_cannot_be_captured_is_named():
    def f(z, x):
        return 0.99 * z + x * float(x.amax())

    x = torch.ones(4, 8, device="cuda")
    with pytest.raises(tw.MapError, match="cannot be captured"):
        solve("picard", f, 0 * x, (x,), Control(1e-9, 400, cuda_graphs=True))


def test_graphs_refuse_what_they_cannot_do():
    x = torch.ones(4, 8, device="cuda")
    layout, z = Layout.of(0 * x)
    equation = Equation(lambda z, x: 0.5 * z + x, layout, (x,), 4)
    control = Control(1e-9, 40, cuda_graphs=True)
    with pytest.raises(tw.OptionError, match="recording"):
        driver.solve(tw.solver("picard"), equation, z, control)
    with torch.no_grad(), pytest.raises(tw.OptionError, match="runs its own"):
        driver.solve(tw.solver("torchdeq.broyden"), equation, z, control)


def test_peak_memory_of_plain_iteration():
    x = torch.randn(64, 1 << 16, device="cuda")
    state = x.numel() * x.element_size()
    z0 = torch.zeros_like(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solve("picard", lambda z, x: 0.5 * z + x, z0, (x,), Control(1e-5, 60))
    assert torch.cuda.max_memory_allocated() - before < 9 * state
