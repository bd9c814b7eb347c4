"""Checks of what a solver leaves behind, lets through, and does with a budget that is just enough."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import adjoints, kernels
from ..adjoints.equation import Equation
from ..fixed_point import fix
from ..solvers import StepSolver
from ..state import Layout
from ..trees import leaves
from ..types import Iteration, Status
from . import problems
from .case import (
    NotApplicable,
    SolverCase,
    assert_converged_rows,
    close,
    quiet_fix,
    solver_check,
    true_residual,
)
from .problems import Problem
from .solver_results import counted, take

__all__ = ["leaves_settings_alone", "units"]


def units(batch: int = 4) -> Problem:
    """A tuple of two tensors in different units: one of 1e4 that settles at once, one of 1e-3 that is slow.

    A norm over both sees the first alone.
    """
    x = torch.linspace(-1, 1, 3 * batch, dtype=torch.float64).view(batch, 3) + 1.5

    def f(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.01 * z[0] + 1e4 * x, 0.8 * z[1] + 1e-3 * x

    return Problem("units", f, (0 * x, 0 * x), (x,), ())


@solver_check
def every_part_settles(case: SolverCase) -> None:
    """With ``stop="rel"`` each tensor of a tuple or dict meets the tolerance, whatever its units."""
    for norm in ("l2", "max"):
        problem = units()
        solution = case.fix(problem, tol=1e-6, max_iter=400, norm=norm)
        assert bool(solution.converged.all()), f"{problem.name}: {solution.describe()}"
        assert_converged_rows(problem, solution, 1e-6, norm=norm)


@solver_check
def tight_tolerances(case: SolverCase) -> None:
    """Rows called converged at 1e-12 are: no floor is built into the test."""
    for make in (problems.affine, problems.rotation):
        problem = make()
        for stop in ("rel", "abs"):
            assert_converged_rows(problem, case.fix(problem, tol=1e-12, max_iter=600, stop=stop), 1e-12, stop)


@solver_check
def large_states(case: SolverCase) -> None:
    """States of 1e4 are solved as those of 1 are: no bound is built into the method."""
    plain = problems.affine()
    problem = replace(plain, name="large", f=lambda z, x: 1e4 * plain.f(z / 1e4, x))
    solution = case.fix(problem, tol=1e-8, max_iter=1000)
    assert bool(solution.converged.all()), f"{problem.name}: {solution.describe()}"
    assert_converged_rows(problem, solution, 1e-8)
    close(solution.value, 1e4 * problems.solution(plain), 1e-5, "the solution of a large state", atol=1e-2)


@solver_check
def budget_is_used(case: SolverCase) -> None:
    """A budget that is just enough is enough, and a row that runs out has had all of it."""
    for make in (problems.shift, problems.rotation, case.rows):
        problem = make()
        full = case.fix(problem, tol=1e-6, max_iter=400)
        needed = int(full.steps.max())
        enough = case.fix(problem, tol=1e-6, max_iter=needed)
        assert torch.equal(enough.status, full.status), (
            f"{problem.name}: statuses {enough.status.tolist()} with max_iter={needed}, which is what the "
            f"solve takes; {full.status.tolist()} with 400"
        )
        for max_iter in (2, 5):
            problem, seen = counted(make())
            solution = case.fix(problem, tol=1e-13, max_iter=max_iter)
            out = solution.status == int(Status.max_iter)
            assert bool((seen[out] == max_iter).all()), (
                f"{problem.name}: rows that ran out of max_iter={max_iter} evaluations were evaluated "
                f"{seen[out].tolist()} times"
            )


@solver_check
def kernels_change_nothing(case: SolverCase) -> None:
    """With the compiled kernels, a ``compiled`` of the solver's own included, rows end as without them."""
    if not kernels.available():
        raise NotApplicable(f"the compiled kernels are not in use: {kernels.describe()}")
    for problem in (case.rows(), problems.rotation(), units()):
        by_kernels = case.fix(problem, tol=1e-9, max_iter=400)
        with kernels.disabled():
            without = case.fix(problem, tol=1e-9, max_iter=400)
        assert torch.equal(by_kernels.status, without.status), (
            f"{problem.name}: statuses {by_kernels.status.tolist()} by the compiled kernels, "
            f"{without.status.tolist()} without them"
        )
        good = without.converged
        pairs = zip(leaves(by_kernels.value), leaves(without.value), strict=True)
        for one, other in pairs:
            close(one[good], other[good], 1e-5, f"{problem.name}: what the compiled kernels give", atol=1e-6)


@solver_check
def reports_are_integers(case: SolverCase) -> None:
    """Statuses and steps are integer tensors, and ``evaluations`` is an int."""
    for problem in (case.rows(), problems.shift()):
        solution = case.fix(problem, tol=1e-6, max_iter=20)
        for name in ("status", "steps"):
            dtype = getattr(solution, name).dtype
            integer = not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool
            assert integer, f"{name} is of {dtype}, not of an integer dtype"
        assert type(solution.evaluations) is int, f"evaluations is a {type(solution.evaluations).__name__}"


@solver_check
def what_the_callback_sees(case: SolverCase) -> None:
    """Each state shown has the residual shown with it, also when it is looked at after the solve."""
    problem = case.rows()
    seen: list[Iteration] = []
    case.fix(problem, tol=1e-8, callback=seen.append)
    for one in seen:
        true = true_residual(take(problem, one.rows.tolist()), one.value)
        what = f"step {one.step}: the residual shown and that of the state shown"
        close(one.residual.double(), true, 1e-4, what, atol=1e-13)


class _Stop(Exception):
    """What the checks raise; nobody else catches it."""


@solver_check
def errors_pass(case: SolverCase) -> None:
    """What ``f`` or the callback raises reaches the caller: it is neither swallowed nor replaced."""
    problem = case.rows()

    def failing(after: int) -> Callable[..., Any]:
        calls = 0

        def count(*given: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise _Stop

        return count

    for after in (0, 2):
        fail = failing(after)

        def f(z: Tensor, *context: Tensor, fail: Callable[..., Any] = fail) -> Tensor:
            fail()
            return problem.f(z, *context)

        attempts: dict[str, tuple[Problem, dict[str, Any]]] = {
            "f": (replace(problem, f=f), {}),
            "the callback": (problem, {"callback": failing(after)}),
        }
        for who, (attempted, options) in attempts.items():
            try:
                case.fix(attempted, tol=1e-9, **options)
            except _Stop:
                continue
            raise AssertionError(f"what {who} raises in evaluation {after + 1} is swallowed")


@contextmanager
def leaves_settings_alone() -> Iterator[None]:
    """Fails if torch's random state, its grad mode, dtype or warnings filters are others afterwards.

    They are put back in any case.
    """
    torch.rand(1)  # so that the state is not the one that a seed leaves, should the call set that seed
    before = _settings()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        filters = list(warnings.filters)
        try:
            yield
            after, changed = _settings(), list(warnings.filters) != filters
        finally:
            torch.set_rng_state(before["the state of the random generator"])
            torch.set_grad_enabled(before["the grad mode"])
            torch.set_default_dtype(before["the default dtype"])
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"the call changes {name}, which belongs to the caller"
    assert not changed, "the call changes the warnings filters, which belong to the caller"


def _settings() -> dict[str, Any]:
    return {
        "the state of the random generator": torch.get_rng_state(),
        "the grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
    }


@solver_check
def settings(case: SolverCase) -> None:
    """The random state, the grad mode, the default dtype and the warnings filters stay as they were."""
    problem = case.rows()
    for adjoint in ("implicit", "unrolled"):  # without and with a graph
        with leaves_settings_alone():
            fix(
                problem.f, problem.z0, *problem.context,
                solver=case.solver, adjoint=adjoint, tol=1e-8, max_iter=500,
            )  # fmt: skip


@solver_check
def nothing_is_kept(case: SolverCase) -> None:
    """A solver that goes on living does not keep the tensors of a solve that is done with."""
    x = problems.affine().context[0].clone()
    problem = replace(problems.affine(), context=(x,))
    watch = weakref.ref(x)
    solution = case.fix(problem, tol=1e-8)
    assert bool(solution.converged.all()), solution.describe()
    del x, problem, solution
    gc.collect()
    assert watch() is None, "the context of a finished solve is still referred to"


@solver_check
def autocast_reaches_f(case: SolverCase) -> None:
    """``f`` runs under the caller's autocast, in every evaluation."""
    problem = case.rows(hardest=0.5, dtype=torch.float32)
    modes: list[bool] = []

    def f(z: Tensor, *context: Tensor) -> Tensor:
        modes.append(torch.is_autocast_enabled("cpu"))
        return problem.f(z, *context)

    for enabled in (True, False):
        modes.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            case.fix(replace(problem, f=f), tol=2e-2, max_iter=60)
        assert set(modes) == {enabled}, f"autocast was {not enabled} in some evaluations of f, not {enabled}"


@solver_check
def unrolled_second_derivative(case: SolverCase) -> None:
    """Backpropagation through the steps twice is right or raises.

    A step by a ``torch.autograd.Function`` whose backward cannot be differentiated fails here unless it is
    marked with ``once_differentiable``.
    """
    problem = (
        replace(problems.affine(batch=2, size=3)) if case.linear_only else problems.vector(2, 3, norm=0.5)
    )
    (w,) = problem.parameters

    def second(value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((value**3).sum(), w, create_graph=True)
        return torch.autograd.grad((first**2).sum(), w)[0]

    z = problem.z0
    for _ in range(150):
        z = problem.f(z, *problem.context)
    try:
        solution = quiet_fix(problem, solver=case.solver, adjoint="unrolled", tol=1e-13, max_iter=300)
        got = second(solution.value)
    except (RuntimeError, NotImplementedError, ValueError):
        return
    error = problems.relative(got, second(z))
    assert error < 1e-3, f"the second derivative through the steps is off by {error:.2g} without a word"


@solver_check
def backward_tolerance(case: SolverCase) -> None:
    """In the backward solve a residual is relative to the incoming gradient, ``Control.scale``.

    The map adds its context, so that the gradient in the context is the solution of the adjoint's
    equation, whose residual is evaluated anew. The solution is 100 times the incoming gradient.
    """
    x = problems.affine().context[0].clone().requires_grad_()
    rate = torch.linspace(0.2, 0.99, len(x), dtype=torch.float64)[:, None]
    problem = Problem("slow", lambda z, x, rate: rate * z + x, torch.zeros_like(x), (x, rate), ())
    for tol, max_iter in ((1e-2, 2000), (1e-2, 30)):
        adjoint = adjoints.registry.make("implicit", solver=case.solver, tol=tol, max_iter=max_iter)
        solution = quiet_fix(problem, solver="anderson", adjoint=adjoint, tol=1e-10)
        g = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view_as(x)
        (u,) = torch.autograd.grad(solution.value, x, g)
        report = solution.adjoint
        assert report is not None, "the backward solve left no report"
        good = report.status == int(Status.converged)
        true = (rate * u + g - u).norm(dim=1) / g.norm(dim=1)
        assert bool((true <= tol * (1 + 1e-6))[good].all()), (
            f"rows called converged with tol={tol:g} have residuals of {true[good].tolist()} against the "
            "incoming gradient"
        )
        close(
            report.residual[good].double(),
            true[good],
            0.05,
            "the residuals told and those evaluated anew",
            1e-12,
        )


@solver_check
def rows_that_start_anew(case: SolverCase) -> None:
    """A step solver's ``renew`` begins some rows and leaves the others as they are: each goes its own way."""
    solver = case.solver
    if not isinstance(solver, StepSolver) or not solver.renews:
        raise NotApplicable("has no renew that goes with its init and step")
    problem = problems.affine(batch=4)
    layout, z = Layout.of(problem.z0, "z0")
    everybody = Equation(problem.f, layout, problem.context, 4)
    alone = [_iterates(solver, problem, row, 12) for row in range(4)]
    with torch.no_grad():
        state, ages = solver.init(z), [0] * 4
        for step in range(12):
            places = {3: [1], 4: [0, 2], 8: [0, 1, 2, 3]}.get(step, [])
            if places:
                rows = torch.tensor(places)
                z = z.index_fill(0, rows, 0.0)
                state = solver.renew(state, rows, z)
                ages = [0 if row in places else age for row, age in enumerate(ages)]
            fz = everybody.evaluate(z)
            z, state = solver.step(everybody, z, fz, fz - z, state)
            ages = [age + 1 for age in ages]
            for row, age in enumerate(ages):
                close(
                    z[row], alone[row][age - 1], 1e-8, f"iterate {age} of row {row}, which began anew", 1e-10
                )


def _iterates(solver: StepSolver, problem: Problem, row: int, steps: int) -> list[Tensor]:
    """The iterates of a row in a batch of its own, from zero on."""
    assert isinstance(problem.z0, Tensor)
    z = problem.z0[row : row + 1]
    equation = Equation(problem.f, Layout.of(z, "z0")[0], tuple(c[row : row + 1] for c in problem.context), 1)
    with torch.no_grad():
        state, iterates = solver.init(z), []
        for _ in range(steps):
            fz = equation.evaluate(z)
            z, state = solver.step(equation, z, fz, fz - z, state)
            iterates.append(z[0])
    return iterates
