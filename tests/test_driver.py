"""The two loops of step solvers: the same outcome, and few looks of the host in one of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import twnn_plugin as tw
from tests import problems
from tests.methods import NATIVE
from tests.test_hostile import build, problem
from twnn_plugin import kernels
from twnn_plugin.adjoints.equation import Equation
from twnn_plugin.solvers import Control, Outcome, StepSolver, driver
from twnn_plugin.solvers.graphs import Capture, Graphs, Rerun
from twnn_plugin.solvers.masked import bucket, drive_masked
from twnn_plugin.state import Layout

STEP_SOLVERS = [name for name in NATIVE if isinstance(tw.solvers.registry.make(name), StepSolver)]
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


def equation(f, z0, context) -> tuple[Equation, Tensor]:
    layout, z = Layout.of(z0)
    return Equation(f, layout, context, z.shape[0]), z


def stepwise(solver, f, z0, context, control) -> tuple[Outcome, Equation]:
    made, z = equation(f, z0, context)
    with torch.no_grad():
        return driver.drive(tw.solvers.registry.resolve(solver), made, z, control), made


def masked(solver, f, z0, context, control, every, runner=None) -> tuple[Outcome, Equation]:
    made, z = equation(f, z0, context)
    extra = () if runner is None else (runner,)
    with torch.no_grad():
        return drive_masked(tw.solvers.registry.resolve(solver), made, z, control, every, *extra), made


def agree(a: Outcome, b: Outcome, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    assert torch.equal(a.status, b.status) and a.status.dtype == b.status.dtype
    assert torch.equal(a.steps, b.steps) and a.steps.dtype == b.steps.dtype
    assert torch.allclose(a.residual, b.residual, rtol=1e-4, atol=1e-14, equal_nan=True)
    assert torch.allclose(a.value, b.value, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("solver", STEP_SOLVERS)
@pytest.mark.parametrize("make", problems.ALL)
def test_both_loops_have_the_same_outcome(solver, make, every):
    p = make()
    control = Control(tol=1e-9, max_iter=60)
    one, _ = stepwise(solver, p.f, p.z0, p.context, control)
    other, made = masked(solver, p.f, p.z0, p.context, control, every)
    agree(one, other)
    assert made.evaluations >= int(other.steps.sum())


@pytest.mark.parametrize("solver", STEP_SOLVERS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(p=problem, every=st.sampled_from([1, 2, 5]))
def test_both_loops_agree_on_hostile_problems(solver, p, every):
    f, z0, context = build(p)
    control = Control(p["tol"], p["max_iter"], p["stop"], p["norm_kind"])
    with kernels.disabled():  # the rounding of other arithmetic grows where a problem is hostile enough
        one, _ = stepwise(solver, f, z0, context, control)
    other, _ = masked(solver, f, z0, context, control, every)
    agree(one, other, rtol=1e-6, atol=0)
    replayed, _ = masked(solver, f, z0, context, control, every, Graphs(Rerun))
    agree(one, replayed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("stop", ["rel", "abs"])
def test_both_loops_agree_on_coupling_scale_and_broken_rows(coupled, stop):
    p = problems.mixed(batch=9)
    x = p.context[0].clone()
    x[4] = math.nan
    scale = None if coupled else torch.linspace(0.1, 3, 9, dtype=torch.float64)
    control = Control(1e-8, 400, stop, scale=scale, coupled=coupled)
    one, _ = stepwise("picard", p.f, p.z0, (x, p.context[1]), control)
    other, _ = masked("picard", p.f, p.z0, (x, p.context[1]), control, 4)
    agree(one, other)
    assert one.status[4] == tw.Status.non_finite and bool(one.value[4].isnan().any())


def test_both_loops_see_stagnation_in_the_same_evaluation():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=generator)
    w = 0.98 * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(4, 64, generator=generator)
    control = Control(tol=1e-12, max_iter=3000)
    # No context: the arithmetic of a matrix product depends on the rows that are present.
    one, _ = stepwise("picard", lambda z: torch.tanh(z @ w + x), 0 * x, (), control)
    other, _ = masked("picard", lambda z: torch.tanh(z @ w + x), 0 * x, (), control, 4)
    agree(one, other)
    assert bool((one.status == int(tw.Status.stagnated)).all())


def test_rows_leave_in_halves():
    seen = []
    p = problems.mixed(batch=16)

    def f(z, x, rate):
        seen.append(z.shape[0])
        return p.f(z, x, rate)

    outcome, made = masked("picard", f, p.z0, p.context, Control(1e-9, 500), 5)
    assert bool((outcome.status == 0).all())
    assert set(seen) <= {16, 8, 4, 2, 1} and len(set(seen)) >= 4
    assert seen == sorted(seen, reverse=True) and all(seen.count(size) % 5 == 0 for size in seen)
    assert made.evaluations == sum(seen)


def test_buckets():
    assert [bucket(n, 12) for n in (12, 7, 6, 5, 4, 3, 2, 1)] == [12, 12, 6, 6, 6, 3, 2, 1]
    assert bucket(1, 1) == 1


class Looks(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in SYNCHRONISING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_the_host_looks_once_in_a_few_evaluations(solver, every):
    p = problems.mixed(batch=16)
    with Looks() as looks:
        outcome, _ = masked(solver, p.f, p.z0, p.context, Control(1e-9, 500), every)
    assert 0 < looks.count <= math.ceil(int(outcome.steps.max()) / every)


def test_the_counter_of_looks_counts():
    with kernels.disabled(), Looks() as looks:
        stepwise("picard", lambda z: 0.5 * z, torch.ones(2, 2), (), Control(1e-3, 50))
    assert looks.count >= 10


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_replayed_evaluations_give_the_same_outcome(solver, every):
    p = problems.vector(batch=16, size=24, norm=0.999)
    control = Control(1e-12, 400)
    if solver == "broyden":  # its structures come back once its memory was full
        solver = tw.solver("broyden", memory=every)
    runner = Graphs(Rerun)
    one, plain = masked(solver, p.f, p.z0, p.context, control, every)
    other, replayed = masked(solver, p.f, p.z0, p.context, control, every, runner)
    agree(one, other)
    assert plain.evaluations == replayed.evaluations
    assert runner.replays > 0


def test_replays_read_memory_that_stays_where_it_is():
    addresses: dict[tuple, set[int]] = {}
    recording = []

    class Watched(Rerun):
        def replay(self):
            recording.append(True)
            super().replay()
            recording.pop()

    def f(z, x):
        if recording:
            addresses.setdefault(tuple(z.shape), set()).add(z.data_ptr())
        return torch.tanh(0.95 * z + x)

    x = torch.linspace(0.01, 1, 8)[:, None].repeat(1, 4)
    runner = Graphs(Watched)
    masked("picard", f, 0 * x, (x,), Control(1e-7, 300), 1, runner)
    assert runner.replays > 10
    # Two structures of the carry for each size: before and after stagnation is first looked for.
    assert addresses and all(len(found) <= 2 for found in addresses.values())


@dataclass(frozen=True)
class Counting(StepSolver):
    """A state that never has the same structure twice."""

    def init(self, z):
        return 0

    def step(self, problem, z, fz, r, state):
        return fz, state + 1


def test_a_state_that_never_recurs_is_refused_and_named():
    x = torch.ones(2, 3)
    with pytest.raises(tw.OptionError, match="nothing to repeat"):
        masked(Counting(), lambda z, x: 0.99 * z + x, 0 * x, (x,), Control(1e-7, 500), 5, Graphs(Rerun))


def test_a_capture_has_the_methods_that_graphs_use():
    class Broken(Rerun):
        def record(self, work):
            raise tw.MapError("no")

    capture: Capture = Broken()
    assert capture is not None
    x = torch.ones(2, 3)
    with pytest.raises(tw.MapError):
        masked("picard", lambda z, x: 0.9 * z + x, 0 * x, (x,), Control(1e-6, 200), 5, Graphs(Broken))


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_unrolled_derivatives_through_the_masked_loop(solver):
    p = problems.mixed(batch=5)
    (x, rate), (w,) = p.context, p.parameters
    made, z = equation(p.f, p.z0, (x, rate))
    outcome = drive_masked(tw.solvers.registry.resolve(solver), made, z, Control(1e-12, 400), 5)
    (gradient,) = torch.autograd.grad(outcome.value.square().sum(), w)
    _, (exact,), _ = problems.reference(p, 2 * outcome.value.detach())
    assert problems.relative(gradient, exact) < 1e-6


def test_options_are_checked():
    with pytest.raises(tw.OptionError, match="check_every"):
        Control(1e-3, 5, check_every=0)
    with pytest.raises(tw.OptionError, match="check_every"):
        Control(1e-3, 5, check_every=True)
    with pytest.raises(tw.OptionError, match="callback"):
        Control(1e-3, 5, callback=print, check_every=3)
    x = torch.ones(2, 3)
    made, z = equation(lambda z, x: 0.5 * z + x, 0 * x, (x,))
    with pytest.raises(tw.OptionError, match="CUDA device"):
        driver.solve(tw.solver("picard"), made, z, Control(1e-3, 5, cuda_graphs=True))


def test_check_every_reaches_the_loop():
    seen = []

    def f(z, x):
        seen.append(z.shape[0])
        return 0.5 * z + x

    x = torch.ones(2, 3)
    made, z = equation(f, 0 * x, (x,))
    with torch.no_grad(), warnings.catch_warnings():
        outcome = driver.solve(tw.solver("picard"), made, z, Control(1e-3, 50, check_every=7))
    assert len(seen) % 7 == 0 and int(outcome.steps.max()) < len(seen)


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_memory_that_is_written_again_is_nobody_elses(solver):
    p = problems.mixed(batch=10)
    before = [t.detach().clone() for t in (p.z0, *p.context)]
    kept, copies = [], []

    def watch(iteration):
        kept.append(iteration.value)
        copies.append(iteration.value.clone())

    control = Control(1e-10, 400, callback=watch)
    outcome, _ = stepwise(solver, p.f, p.z0, p.context, control)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (p.z0, *p.context), strict=True))
    # f that hands its context back: what it returns is not ours to write to.
    x = torch.randn(4, 3)
    copy = x.clone()
    stepwise(solver, lambda z, x: x, torch.zeros(4, 3), (x,), Control(1e-6, 20))
    assert torch.equal(x, copy)
    assert bool((outcome.status == 0).all())
