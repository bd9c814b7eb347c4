"""Checks of a solver's results: residuals, statuses, and rows that do not see each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solvers.picard import Picard
from ..types import Iteration, Solution, Status
from . import problems
from .case import SolverCase, assert_converged_rows, close, solver_check, true_residual
from .problems import Problem, flatten

__all__ = ["counted", "take"]


def counted(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem with one more context tensor, and (B,) evaluations of each row as they are made."""
    batch = flatten(problem.z0).shape[0]
    seen = torch.zeros(batch, dtype=torch.long)

    def f(z: Any, *context: Tensor) -> Any:
        seen.index_add_(0, context[-1].long(), torch.ones_like(context[-1], dtype=torch.long))
        return problem.f(z, *context[:-1])

    index = torch.arange(batch, dtype=torch.float64)
    return replace(problem, f=f, context=(*problem.context, index)), seen


def take(problem: Problem, rows: list[int]) -> Problem:
    """The problem with some of its rows; its state is one tensor."""
    return replace(problem, z0=problem.z0[rows], context=tuple(c[rows] for c in problem.context))


def _solved(problem: Problem, solution: Solution, tol: float) -> None:
    assert bool(solution.converged.all()), f"{problem.name} is not solved: {solution.describe()}"
    assert_converged_rows(problem, solution, tol)
    true = true_residual(problem, solution.value)
    close(solution.residual.double(), true, 0.05, f"{problem.name}: reported and true residual", atol=1e-13)


@solver_check
def solves_contractions(case: SolverCase) -> None:
    """Contractions of rate 0.9 at most are solved to 1e-8, and the values are the fixed points."""
    mild = [problems.affine()] if case.linear_only else [problems.vector(norm=0.8), problems.conv_cell()]
    for problem in [*mild, case.rows(hardest=0.8)]:
        solution = case.fix(problem, tol=1e-8, max_iter=1000)
        _solved(problem, solution, 1e-8)
        exact = flatten(problems.solution(problem))
        close(flatten(solution.value), exact, 1e-5, f"{problem.name}: the value and the fixed point", 1e-6)


@solver_check
def structures(case: SolverCase) -> None:
    """Tuples, dicts, images and (B,) scalars come back as they went in, solved."""
    if not case.linear_only:
        for make in (problems.tuple_state, problems.dict_state, problems.two_scale):
            problem = make()
            solution = case.fix(problem, tol=1e-8, max_iter=500)
            assert type(solution.value) is type(problem.z0), f"{type(problem.z0)} became {solution.value!r}"
            _solved(problem, solution, 1e-8)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    scalar = Problem("scalar", lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), ())
    solution = case.fix(scalar, tol=1e-8)
    close(solution.value, 2 * x, 1e-6, "one number a row", atol=1e-9)


@solver_check
def converged_means_converged(case: SolverCase) -> None:
    """No row is called converged whose residual, evaluated anew, exceeds the tolerance.

    Over maps that are hard for one method or another (complex pairs, a travelling front, an expanding
    map, no fixed point), both stopping rules, both norms, and budgets that end early.
    """
    makes: list[Callable[[], Problem]] = [problems.affine, problems.rotation, problems.shift]
    makes += [problems.expanding]
    if not case.linear_only:
        makes += [problems.mixed, problems.non_symmetric, problems.no_solution]
    for make in makes:
        problem = make()
        for stop, norm in (("rel", "l2"), ("rel", "max"), ("abs", "l2"), ("abs", "max")):
            for tol, max_iter in ((1e-2, 40), (1e-7, 9)):
                rule: dict[str, Any] = {"stop": stop, "norm": norm}
                solution = case.fix(problem, tol=tol, max_iter=max_iter, **rule)
                assert_converged_rows(problem, solution, tol, stop, norm)
                known = {int(status) for status in Status}
                assert set(solution.status.tolist()) <= known, f"unknown statuses {solution.status}"


@solver_check
def statuses(case: SolverCase) -> None:
    """A slow row runs out, a row without a fixed point fails, NaN and infinity are non-finite."""
    x = torch.tensor([[1.0, -0.5], [1.0, 0.3], [math.nan, 1.0], [math.inf, 1.0]], dtype=torch.float64)
    broken = Problem("NaN and inf", lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), ())
    solution = case.fix(broken, tol=1e-8, max_iter=100)
    expected = [Status.converged, Status.converged, Status.non_finite, Status.non_finite]
    assert solution.status.tolist() == expected, f"statuses {solution.status.tolist()}, not {expected}"
    assert bool((~torch.isfinite(solution.value[2:])).any(dim=1).all()), "the values of rows 2 and 3 hide it"
    assert solution.steps[2:].tolist() == [1, 1], "a non-finite row is iterated further"
    slow = problems.shift(size=12)
    solution = case.fix(slow, tol=1e-8, max_iter=3)
    failed = solution.status != int(Status.converged)
    assert bool(failed.all()), "a front of 12 places cannot settle in 3 evaluations"
    assert bool((solution.status == int(Status.max_iter)).all()), f"statuses {solution.status.tolist()}"
    if not case.linear_only:
        problem = problems.no_solution()
        solution = case.fix(problem, tol=1e-6, max_iter=200)
        lost = problem.context[1][:, 0] > 0
        assert bool(solution.converged[~lost].all()), "rows with a fixed point are not solved"
        assert not bool(solution.converged[lost].any()), "rows without a fixed point are called converged"


@solver_check
def neighbours(case: SolverCase) -> None:
    """A row's value, status and steps are those it has alone, in any company."""
    problem = case.rows()
    together = case.fix(problem, tol=1e-9)
    for row in range(together.steps.numel()):
        alone = case.fix(take(problem, [row]), tol=1e-9)
        _same(together, row, alone, 0, f"row {row} in the batch and alone")
    for value in (math.nan, math.inf, 1e30):
        beside = case.fix(problems.poisoned(problem, 2, value), tol=1e-9)
        for row in range(together.steps.numel()):
            if row != 2:
                _same(together, row, beside, row, f"row {row} beside a row of {value}")
    order = list(reversed(range(together.steps.numel())))
    turned = case.fix(take(problem, order), tol=1e-9)
    for row in order:
        _same(together, row, turned, len(order) - 1 - row, f"row {row} in another order")


def _same(a: Solution, i: int, b: Solution, j: int, what: str) -> None:
    assert int(a.status[i]) == int(b.status[j]), f"{what}: status {a.status[i]} and {b.status[j]}"
    assert int(a.steps[i]) == int(b.steps[j]), f"{what}: {a.steps[i]} and {b.steps[j]} steps"
    close(a.value[i], b.value[j], 1e-7, what, atol=1e-10)


@solver_check
def frozen_rows(case: SolverCase) -> None:
    """What f returns for a row after it finished changes nothing: not the row, not another one."""
    problem = case.rows()
    clean = case.fix(problem, tol=1e-8)
    index = torch.arange(clean.steps.numel(), dtype=torch.float64)
    for garbage in (math.nan, math.inf, 1e30, 0.0):
        done: set[int] = set()

        def f(
            z: Tensor, x: Tensor, rate: Tensor, index: Tensor, done: set[int] = done, bad: float = garbage
        ) -> Tensor:
            finished = torch.tensor([int(i) in done for i in index.tolist()])
            return torch.where(finished[:, None], bad, problem.f(z, x, rate))

        def watch(seen: Iteration, done: set[int] = done) -> None:
            done.update(seen.rows[seen.residual <= 1e-8].tolist())

        traps = (
            replace(problem, f=f, context=(*problem.context, index)),
            replace(problem, f=lambda z, f=f: f(z, *problem.context, index), context=()),  # none may leave
        )
        for trap in traps:
            done.clear()
            solution = case.fix(trap, tol=1e-8, callback=watch)
            what = f"f returns {garbage} for finished rows"
            assert done, f"{what}: the callback saw no row finish"
            assert torch.equal(solution.status, clean.status), f"{what}: statuses {solution.status.tolist()}"
            assert torch.equal(solution.steps, clean.steps), f"{what}: steps {solution.steps.tolist()}"
            close(solution.value, clean.value, 1e-9, what, atol=1e-12)


@solver_check
def rows_leave(case: SolverCase) -> None:
    """With context, finished rows leave the batch; every evaluation of a row is counted."""
    problem, seen = counted(case.rows(batch=20, size=16, hardest=0.95))
    solution = case.fix(problem, tol=1e-8, max_iter=1000)
    assert bool(solution.converged.all()), solution.describe()
    total, longest = int(seen.sum()), int(seen.max())
    assert solution.evaluations == total, f"{solution.evaluations} reported, {total} rows evaluated"
    assert bool((seen >= solution.steps).all()), "a row reports more steps than evaluations"
    assert total < 0.8 * longest * seen.numel(), f"{total} of {longest} x {seen.numel()}: no row left early"
    assert int(solution.steps[0]) < int(solution.steps[-1]), "an easy row takes as long as a hard one"


@solver_check
def deterministic(case: SolverCase) -> None:
    """The same call twice gives the same bits."""
    problem = case.rows()
    one, two = (case.fix(problem, tol=1e-9) for _ in range(2))
    assert torch.equal(one.value, two.value), "two identical calls differ"
    assert torch.equal(one.steps, two.steps) and torch.equal(one.status, two.status)


@solver_check
def coupled_rows(case: SolverCase) -> None:
    """With ``coupled=True`` nobody leaves and all rows finish together, at the joint solution.

    In at most three times the evaluations of plain iteration: acceleration that extrapolates each of
    the coupled rows by itself misleads the others.
    """
    if case.linear_only:
        x = torch.tensor([[0.0], [4.0], [1.0]], dtype=torch.float64)
        problem = Problem("mean", lambda z, x: 0.5 * z.mean(0, keepdim=True) + x, 0 * x, (x,), (), True)
    else:
        problem = problems.coupled()
    watched, seen = counted(problem)
    solution = case.fix(watched, tol=1e-8)
    assert bool(solution.converged.all()), solution.describe()
    assert len(set(seen.tolist())) == 1, f"rows were evaluated {seen.tolist()} times"
    assert len(set(solution.steps.tolist())) == 1, f"rows finished after {solution.steps.tolist()} steps"
    assert_converged_rows(problem, solution, 1e-8)
    plain = SolverCase(Picard()).fix(problem, tol=1e-8)
    spent, enough = int(solution.steps.max()), 3 * int(plain.steps.max())
    assert spent <= enough, f"{spent} steps, where plain iteration needs {enough // 3}"
