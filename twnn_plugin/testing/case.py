"""What is checked, what it declares, and how a list of checks is run."""

from __future__ import annotations

import copy
import unittest
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import adjoints, solvers
from ..adjoints import Adjoint
from ..errors import ConvergenceWarning, OptionError, UnknownNameError, nearest
from ..fixed_point import fix
from ..registry import Registry
from ..solvers import Solver
from ..types import Solution
from .problems import Problem, by_rows, flatten

__all__ = [
    "ADJOINT_CHECKS",
    "SOLVER_CHECKS",
    "AdjointCase",
    "NotApplicable",
    "Result",
    "SolverCase",
    "adjoint_check",
    "assert_converged_rows",
    "close",
    "options_are_checked",
    "quiet_fix",
    "run_checks",
    "solver_check",
    "true_residual",
]

Check = Callable[..., None]

SOLVER_CHECKS: dict[str, Check] = {}
"""Checks of a solver by name: ``check(solver, linear_only=False)``."""

ADJOINT_CHECKS: dict[str, Check] = {}
"""Checks of an adjoint by name: ``check(adjoint, exact=None, through_loop=False)``."""


class NotApplicable(unittest.SkipTest):
    """The check asks for something that the subject declares not to give.

    A subclass of :class:`unittest.SkipTest`, so that pytest and unittest count the check as skipped.
    """


@dataclass(frozen=True)
class Result:
    """How one check went.

    Attributes:
        name: of the check.
        outcome: ``"passed"``, ``"skipped"`` or ``"failed"``.
        message: why it was skipped or failed.
    """

    name: str
    outcome: str
    message: str = ""


def _made(subject: Any, registry: Registry[Any]) -> Any:
    if callable(subject) and not isinstance(subject, registry.base):
        subject = subject()
    return registry.resolve(subject)


@dataclass(frozen=True)
class SolverCase:
    """A solver under test.

    Attributes:
        solver: the instance.
        linear_only: it solves affine equations only, as an adjoint's linear solver may.
    """

    solver: Solver
    linear_only: bool = False

    def needs_any_map(self) -> None:
        """Raise :class:`NotApplicable` for a solver of affine equations."""
        if self.linear_only:
            raise NotApplicable("declared linear_only; the check's map is not affine")

    def rows(self, **options: Any) -> Problem:
        """:func:`~twnn_plugin.testing.problems.by_rows`, affine if the solver needs that."""
        return by_rows(squash=not self.linear_only, **options)

    def fix(self, problem: Problem, **options: Any) -> Solution:
        """``fix`` without a graph and without warnings."""
        with torch.no_grad():
            return quiet_fix(problem, solver=self.solver, **options)


@dataclass(frozen=True)
class AdjointCase:
    """An adjoint under test.

    Attributes:
        adjoint: the instance.
        exact: its gradients are those of the fixed point, up to the tolerance.
        through_loop: it differentiates the iterations: memory grows with them, and the starting
            state may get a gradient.
    """

    adjoint: Adjoint
    exact: bool
    through_loop: bool = False

    def needs_exact(self) -> None:
        """Raise :class:`NotApplicable` for an adjoint that declares itself approximate."""
        if not self.exact:
            raise NotApplicable("declares exact = False; the check compares with the exact derivative")

    def needs_equation(self) -> None:
        """Raise :class:`NotApplicable` for an adjoint that differentiates the iterations."""
        if self.through_loop:
            raise NotApplicable("declared through_loop; the check is about a derivative at the solution")

    def fix(self, problem: Problem, **options: Any) -> Solution:
        """``fix`` without warnings, solved tightly."""
        # Of acceleration, the derivative of the computed state need not be that of the solution.
        solver = "picard" if self.through_loop else "anderson"
        options = {"tol": 1e-12, "max_iter": 1000, "solver": solver, **options}
        return quiet_fix(problem, adjoint=self.adjoint, **options)

    def gradients(self, problem: Problem, cotangent: Any, **options: Any) -> tuple[Solution, list[Tensor]]:
        """The solution, and gradients of ``(cotangent * z).sum()``: parameters, first context tensor."""
        x = problem.context[0].detach().clone().requires_grad_()
        problem = Problem(
            problem.name,
            problem.f,
            problem.z0,
            (x, *problem.context[1:]),
            problem.parameters,
            problem.coupled,
        )
        solution = self.fix(problem, **options)
        loss = (flatten(solution.value) * flatten(cotangent)).sum()
        return solution, list(torch.autograd.grad(loss, [*problem.parameters, x]))


def solver_check(check: Callable[[SolverCase], None]) -> Check:
    """Add a check to :data:`SOLVER_CHECKS` under the name of its function."""

    def run(solver: str | Solver | Callable[[], Solver], *, linear_only: bool = False) -> None:
        _guard(check, SolverCase(_made(solver, solvers.registry), linear_only))

    return _named(run, check, SOLVER_CHECKS)


def adjoint_check(check: Callable[[AdjointCase], None]) -> Check:
    """Add a check to :data:`ADJOINT_CHECKS` under the name of its function."""

    def run(
        adjoint: str | Adjoint | Callable[[], Adjoint],
        *,
        exact: bool | None = None,
        through_loop: bool = False,
    ) -> None:
        made = _made(adjoint, adjoints.registry)
        _guard(check, AdjointCase(made, made.exact if exact is None else exact, through_loop))

    return _named(run, check, ADJOINT_CHECKS)


def _guard(check: Callable[[Any], None], case: Any) -> None:
    try:
        check(case)
    except (AssertionError, NotApplicable):
        raise
    except Exception as error:  # a crash of the subject is a failed check
        message = f"{check.__name__}: {case} raised {type(error).__name__}: {error}"
        raise AssertionError(message) from error


def _named(run: Check, check: Callable[..., None], table: dict[str, Check]) -> Check:
    run.__name__, run.__qualname__ = check.__name__, check.__qualname__
    run.__doc__, run.__module__ = check.__doc__, check.__module__
    table[check.__name__] = run
    return run


def run_checks(
    what: str, table: Mapping[str, Check], subject: Any, without: Mapping[str, str], traits: dict[str, Any]
) -> list[Result]:
    """Run every check of a table and raise one AssertionError that lists those that failed.

    Args:
        what: ``"solver"`` or ``"adjoint"``, for messages.
        table: checks by name.
        subject: name, instance or factory.
        without: names of checks to leave out, each with the reason.
        traits: what the subject declares, passed to each check.
    """
    if not isinstance(without, Mapping):
        raise OptionError(
            f"without is a dict of check names, each with the reason why it cannot hold; got {without!r:.60}."
        )
    for name in without:
        if name not in table:
            raise UnknownNameError(f"There is no {what} check {name!r}.{nearest(name, table)}")
    results = []
    for name, check in table.items():
        if name in without:
            results.append(Result(name, "skipped", without[name]))
            continue
        try:
            check(subject, **traits)
            results.append(Result(name, "passed"))
        except NotApplicable as reason:
            results.append(Result(name, "skipped", str(reason)))
        except AssertionError as error:  # the other checks still have something to say
            results.append(Result(name, "failed", str(error)))
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        lines = "\n".join(f"  {result.name}: {result.message}" for result in failed)
        raise AssertionError(
            f"{len(failed)} of {len(results)} checks failed for {what} {subject!r}:\n{lines}"
        )
    return results


def quiet_fix(problem: Problem, **options: Any) -> Solution:
    """``fix`` of a problem; rows that fail are in the solution, not in a warning."""
    options = {"tol": 1e-8, "max_iter": 500, "coupled": problem.coupled, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fix(problem.f, problem.z0, *problem.context, **options)


def true_residual(problem: Problem, value: Any, stop: str = "rel", norm: str = "l2") -> Tensor:
    """(B,) residuals of a state by the definition in :func:`twnn_plugin.fix`, evaluated anew.

    With ``stop="rel"`` that of a tuple or dict is the largest of those of its tensors.
    """
    with torch.no_grad():
        image = problem.f(value, *problem.context)
    pairs = [
        (flatten(z).double(), flatten(fz).double())
        for z, fz in zip(_tensors(value, value), _tensors(image, value), strict=True)
    ]
    if stop == "abs":
        pairs = [(torch.cat([z for z, _ in pairs], dim=1), torch.cat([fz for _, fz in pairs], dim=1))]
    return torch.stack([_residual(z, fz, stop, norm) for z, fz in pairs]).amax(dim=0)


def _tensors(state: Any, like: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [state[key] for key in like] if isinstance(like, dict) else list(state)


def _residual(z: Tensor, image: Tensor, stop: str, norm: str) -> Tensor:
    change, size = (image - z).norm(dim=1), image.norm(dim=1)
    if norm == "max":
        change, size = (image - z).abs().amax(dim=1), size / z.shape[1] ** 0.5
    return change / (size + 1e-9) if stop == "rel" else change


def assert_converged_rows(
    problem: Problem, solution: Solution, tol: float, stop: str = "rel", norm: str = "l2"
) -> None:
    """What is called converged is finite and within the tolerance; the report is not trusted."""
    good = solution.converged
    value = flatten(solution.value)
    assert bool(torch.isfinite(value[good]).all()), "a row is called converged and holds NaN or infinity"
    # Rounding of the state to its dtype, and of f on a batch of another size.
    slack = 8 * torch.finfo(value.dtype).eps
    if stop == "abs":
        slack *= max(1.0, float(value[good].double().abs().max())) * value.shape[1] if good.any() else 0
    true = true_residual(problem, solution.value, stop, norm)
    wrong = good & ~(true <= tol * (1 + 1e-5) + slack)
    assert not bool(wrong.any()), (
        f"{problem.name}: rows {wrong.nonzero().flatten().tolist()} are called converged with tol={tol:g}, "
        f"stop={stop!r}, norm={norm!r}; their residuals, evaluated anew, are {true[wrong].tolist()}"
    )


def close(a: Tensor, b: Tensor, rtol: float, what: str, atol: float = 0.0) -> None:
    """Assert that two tensors agree, NaN with NaN, and say by how much they do not."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    agree = torch.allclose(a, b, rtol=rtol, atol=atol + rtol * 1e-6, equal_nan=True)
    assert agree, f"{what}: they differ by up to {float((a - b).detach().abs().max()):.3g}"


def options_are_checked(subject: Solver | Adjoint, registry: Registry[Any]) -> None:
    """Unknown, NaN and fractional options raise :class:`OptionError`; a copy equals the original."""
    assert copy.deepcopy(subject) == subject, "a deep copy differs from the original"
    for entry in registry.entries():
        if entry.factory is type(subject):
            _refuses(lambda name=entry.name: registry.make(name, no_such_option=1), "an unknown option")
    if not is_dataclass(subject) or not fields(subject):
        raise NotApplicable("declares no options (its class is no dataclass with fields)")
    kind: Any = type(subject)
    hints = get_type_hints(kind)
    for field in fields(subject):
        kinds = {hints[field.name], *getattr(hints[field.name], "__args__", ())}
        if float in kinds:
            _refuses(lambda f=field: kind(**{f.name: float("nan")}), f"{field.name}=nan")
        elif int in kinds:
            _refuses(lambda f=field: kind(**{f.name: 2.5}), f"{field.name}=2.5")
            _refuses(lambda f=field: kind(**{f.name: -1}), f"{field.name}=-1")


def _refuses(make: Callable[[], Any], what: str) -> None:
    try:
        make()
    except OptionError:
        return
    except Exception as error:
        raise AssertionError(f"{what} raises {type(error).__name__} ({error}), not OptionError") from error
    raise AssertionError(f"{what} is accepted without a word; it must raise OptionError")
