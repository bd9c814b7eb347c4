"""Checks of what a solver accepts and keeps to: budgets, dtypes, shapes, options, modes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import adjoints, solvers
from ..errors import FixedPointError
from ..fixed_point import fix
from ..registry import Registry
from ..solvers import StepSolver
from ..trees import leaves
from ..types import Iteration, Status
from . import problems
from .case import (
    NotApplicable,
    SolverCase,
    assert_converged_rows,
    close,
    options_are_checked,
    quiet_fix,
    solver_check,
    true_residual,
)
from .problems import Problem
from .solver_results import counted

__all__: list[str] = []


@solver_check
def budget(case: SolverCase) -> None:
    """No row is evaluated more than ``max_iter`` times, whatever the method does in a step."""
    for max_iter in (1, 2, 3, 4, 7, 20):
        for make in (problems.shift, problems.rotation):
            problem, seen = counted(make())
            solution = case.fix(problem, tol=1e-12, max_iter=max_iter)
            most = int(seen.max())
            assert most <= max_iter, f"max_iter={max_iter}: a row was evaluated {most} times"
            assert solution.evaluations == int(seen.sum()), (
                f"{solution.evaluations} reported, {seen.sum()} made"
            )
            steps = solution.steps
            assert int(steps.min()) >= 1 and int(steps.max()) <= max_iter, f"steps {steps.tolist()}"


@solver_check
def few_evaluations(case: SolverCase) -> None:
    """One and two evaluations move the state and report a residual that was measured.

    torchdeq's anderson returns the initial guess and a residual of 1e8 there.
    """
    problem = problems.rotation()
    first = true_residual(problem, problem.z0)
    for max_iter in (1, 2):
        solution = case.fix(problem, tol=1e-12, max_iter=max_iter)
        assert bool((solution.status == int(Status.max_iter)).all()), f"statuses {solution.status.tolist()}"
        assert not torch.equal(solution.value, problem.z0), "the initial guess came back"
        assert bool(torch.isfinite(solution.value).all())
        if max_iter == 1:
            close(solution.residual.double(), first, 1e-6, "the residual at the start")
    easy = Problem("solved", lambda z, x: x + 0 * z, problem.context[0], problem.context, ())
    solution = case.fix(easy, tol=1e-6, max_iter=1)
    assert bool(solution.converged.all()), "a start that is the solution is not recognised in one evaluation"


@solver_check
def dtypes(case: SolverCase) -> None:
    """float64, float32, bfloat16 and float16 states keep their dtype and are solved."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problem = case.rows(hardest=0.6, dtype=dtype)
        solution = case.fix(problem, tol=2e-2, max_iter=100)
        assert solution.value.dtype == dtype, f"{dtype} became {solution.value.dtype}"
        assert solution.residual.dtype in (torch.float32, torch.float64), "residuals of half precision"
        assert bool(solution.converged.all()), f"{dtype}: {solution.describe()}"
        assert_converged_rows(problem, solution, 2e-2)


@solver_check
def autocast(case: SolverCase) -> None:
    """Under autocast a float32 state stays float32 and is solved to the autocast dtype's accuracy."""
    w = (0.5 * torch.eye(6)).requires_grad_()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    problem = Problem("autocast", lambda z, x: z @ w + x, torch.zeros_like(x), (x,), (w,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = case.fix(problem, tol=2e-2, max_iter=100)
    assert solution.value.dtype == torch.float32, f"torch.float32 became {solution.value.dtype}"
    assert bool(solution.converged.all()), solution.describe()
    close(solution.value, 2 * x, 0.1, "the solution under autocast", atol=0.05)


@solver_check
def shapes(case: SolverCase) -> None:
    """An empty batch, a batch of one and states of one number work."""
    for batch, size in ((0, 5), (1, 5), (1, 1), (6, 1), (0, 1)):
        x = torch.linspace(-1, 1, batch * size, dtype=torch.float64).view(batch, size)
        problem = Problem("shapes", lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), ())
        solution = case.fix(problem, tol=1e-8, max_iter=100)
        assert solution.value.shape == x.shape, f"{tuple(x.shape)} became {tuple(solution.value.shape)}"
        for what in (solution.status, solution.steps, solution.residual):
            assert what.shape == (batch,), f"a report of shape {tuple(what.shape)} for {batch} rows"
        assert bool(solution.converged.all()), f"{tuple(x.shape)}: {solution.describe()}"
        assert batch or solution.evaluations == 0, "rows of an empty batch were evaluated"
        close(solution.value, 2 * x, 1e-5, f"the solution of shape {tuple(x.shape)}", atol=1e-7)


@solver_check
def inputs_are_left_alone(case: SolverCase) -> None:
    """z0, context and parameters are not written to; strided ones give the same result."""
    problem = case.rows()
    z0 = torch.full_like(problem.z0, 0.1)
    problem = replace(problem, z0=z0)
    tensors = [z0, *problem.context, *problem.parameters]
    before = [tensor.detach().clone() for tensor in tensors]
    solution = case.fix(problem, tol=1e-8)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to in place"
    kept = solution.value.clone()
    solution.value.zero_()
    assert torch.equal(z0, before[0]), "the value returned shares memory with z0"
    strided = replace(problem, z0=_strided(z0), context=tuple(_strided(tensor) for tensor in problem.context))
    assert not strided.z0.is_contiguous()
    close(case.fix(strided, tol=1e-8).value, kept, 1e-9, "strided and contiguous inputs", atol=1e-12)


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, -tensor], dim=-1)[..., 0]


@solver_check
def throw(case: SolverCase) -> None:
    """``throw=True`` raises for rows that failed, with the solution, and not otherwise."""
    problem = case.rows(hardest=0.5)
    with torch.no_grad():
        quiet_fix(problem, solver=case.solver, tol=1e-6, throw=True)
        hopeless = problems.poisoned(problem, 1, float("nan"))
        try:
            fix(hopeless.f, hopeless.z0, *hopeless.context, solver=case.solver, tol=1e-6, throw=True)
        except FixedPointError as error:
            assert "[1]" in str(error), f"the message does not name row 1: {error}"
            assert error.solution is not None, "the error does not hold the solution"
            return
    raise AssertionError("throw=True did not raise for a NaN row")


@solver_check
def callback(case: SolverCase) -> None:
    """The callback sees each evaluation: steps from 1, open rows, their residuals and states."""
    seen: list[Iteration] = []
    problem = case.rows()
    solution = case.fix(problem, tol=1e-8, callback=seen.append)
    assert seen, "the callback was never called"
    steps = [iteration.step for iteration in seen]
    assert steps[0] == 1 and steps == sorted(set(steps)), f"steps {steps}"
    assert steps[-1] == int(solution.steps.max()), f"last step {steps[-1]}, {solution.steps.max()} reported"
    assert seen[-1].evaluations == solution.evaluations, "the last count is not the solution's"
    batch, size = problem.z0.shape
    assert seen[0].rows.tolist() == list(range(batch)), "not every row is open at the first evaluation"
    for iteration in seen:
        assert iteration.rows.shape == iteration.residual.shape, "rows and residuals differ in number"
        assert iteration.value.shape == (iteration.rows.numel(), size), "states are not (b, D)"
        done = solution.steps[iteration.rows] < iteration.step
        assert not bool(done.any()), "a finished row is still shown"
        last = solution.steps[iteration.rows] == iteration.step
        shown, told = iteration.residual[last], solution.residual[iteration.rows[last]]
        close(shown.double(), told.double(), 1e-6, "the last residual shown and the one reported")


class _Watched(StepSolver):
    """Another solver, with the number of tensors it carries from step to step."""

    def __init__(self, inner: StepSolver):
        self.inner = inner
        self.carried: list[int] = []

    def init(self, z: Tensor) -> Any:
        return self.inner.init(z)

    def step(self, problem: Any, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        z, state = self.inner.step(problem, z, fz, r, state)
        self.carried.append(sum(leaf.numel() for leaf in leaves(state) if isinstance(leaf, Tensor)))
        return z, state


@solver_check
def bounded_memory(case: SolverCase) -> None:
    """What a step solver carries from step to step is bounded, whatever ``max_iter`` is."""
    if not isinstance(case.solver, StepSolver):
        raise NotApplicable("a WholeSolver owns its loop; what it carries cannot be seen")
    watched = _Watched(case.solver)
    SolverCase(watched).fix(problems.shift(batch=2, size=120), tol=1e-12, max_iter=110)
    early, late = max(watched.carried[: len(watched.carried) // 2]), max(watched.carried)
    assert late <= early, f"the history grew from {early} to {late} numbers in {len(watched.carried)} steps"


@solver_check
def options(case: SolverCase) -> None:
    """Unknown, NaN, negative and fractional options raise :class:`~twnn_plugin.OptionError`."""
    registry: Registry[solvers.Solver] = solvers.registry
    options_are_checked(case.solver, registry)


@solver_check
def copies(case: SolverCase) -> None:
    """A pickled copy is equal and gives the same result: a solver keeps nothing between calls."""
    clone = pickle.loads(pickle.dumps(case.solver))
    assert clone == case.solver, "the copy differs (write solvers as frozen dataclasses)"
    problem = case.rows()
    one, two = case.fix(problem, tol=1e-9), SolverCase(clone).fix(problem, tol=1e-9)
    assert torch.equal(one.value, two.value), "the copy gives another result"


@solver_check
def grad_modes(case: SolverCase) -> None:
    """The value is the same under no_grad, inference_mode and with gradients."""
    problem = case.rows()
    plain = case.fix(problem, tol=1e-9)
    with torch.inference_mode():
        inferred = quiet_fix(problem, solver=case.solver, tol=1e-9)
    graded = quiet_fix(problem, solver=case.solver, tol=1e-9)
    unrolled = quiet_fix(problem, solver=case.solver, adjoint="unrolled", tol=1e-9)
    for mode, other in (("inference_mode", inferred), ("implicit", graded), ("unrolled", unrolled)):
        close(other.value.detach(), plain.value, 1e-9, f"the value under {mode}", atol=1e-12)
        assert torch.equal(other.steps, plain.steps), f"steps under {mode}"
    assert not plain.value.requires_grad and graded.value.requires_grad


@solver_check
def unrolled_gradient(case: SolverCase) -> None:
    """Backpropagation through the steps gives the gradient of the solution, or raises.

    A step that detaches, writes in place or divides by zero in a branch not taken fails here.
    """
    problem = problems.affine() if case.linear_only else problems.vector(norm=0.6)
    cotangent = torch.linspace(-1, 1, problem.z0.numel(), dtype=torch.float64).view_as(problem.z0)
    _, (expected, *_), _ = problems.reference(problem, cotangent)
    try:
        solution = quiet_fix(problem, solver=case.solver, adjoint="unrolled", tol=1e-12, max_iter=500)
        assert solution.value.requires_grad, "the graph is lost without a word"
        (got,) = torch.autograd.grad((solution.value * cotangent).sum(), problem.parameters)
    except (RuntimeError, NotImplementedError, ValueError):
        return
    assert bool(torch.isfinite(got).all()), "the gradient through the steps is not finite"
    error = problems.relative(got, expected)
    assert error < 1e-4, f"the gradient through the steps is off by {error:.2g} without a word"


@solver_check
def backward_solve(case: SolverCase) -> None:
    """As the solver of the implicit adjoint, it gives exact gradients where it reports convergence."""
    adjoint = adjoints.registry.make("implicit", solver=case.solver, max_iter=500)
    for make in (problems.non_symmetric, problems.rotation, problems.affine):
        problem = make()
        x = problem.context[0].clone().requires_grad_()
        problem = replace(problem, context=(x, *problem.context[1:]))
        cotangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        solution = quiet_fix(problem, solver="anderson", adjoint=adjoint, tol=1e-10)
        (got,) = torch.autograd.grad((solution.value * cotangent).sum(), x)
        _, _, expected = problems.reference(problem, cotangent)
        report = solution.adjoint
        assert report is not None, "the backward solve left no report"
        good = (report.status == int(Status.converged)) & solution.converged
        worst = float((got - expected)[good].norm() / expected.norm())
        assert worst < 1e-6, f"{problem.name}: rows reported converged have a gradient error of {worst:.2g}"
