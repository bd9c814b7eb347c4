"""A conformance suite for solvers and adjoints: problems with known answers, and checks.

A plugin's tests call :func:`check_solver` or :func:`check_adjoint`, or parametrise over
:data:`SOLVER_CHECKS` and :data:`ADJOINT_CHECKS` for a result per check::

    import pytest
    from twnn_plugin import testing

    @pytest.mark.parametrize("name", testing.SOLVER_CHECKS)
    def test_my_solver(name):
        testing.SOLVER_CHECKS[name]("my_solver")

A failed check raises :class:`AssertionError`; one that asks for something the subject declares not to
give raises :class:`NotApplicable`, which pytest and unittest count as skipped. Only torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..adjoints import Adjoint
from ..solvers import Solver
from . import (
    adjoint_gradients,
    adjoint_manners,
    adjoint_transforms,
    problems,
    solver_contract,
    solver_manners,
    solver_results,
)
from .case import (
    ADJOINT_CHECKS,
    SOLVER_CHECKS,
    NotApplicable,
    Result,
    assert_converged_rows,
    run_checks,
    true_residual,
)
from .solver_results import counted

__all__ = [
    "ADJOINT_CHECKS",
    "SOLVER_CHECKS",
    "NotApplicable",
    "Result",
    "adjoint_gradients",
    "adjoint_manners",
    "adjoint_transforms",
    "assert_converged_rows",
    "check_adjoint",
    "check_solver",
    "counted",
    "problems",
    "solver_contract",
    "solver_manners",
    "solver_results",
    "true_residual",
]


def check_solver(
    solver: str | Solver | Callable[[], Solver],
    *,
    linear_only: bool = False,
    without: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run every check of :data:`SOLVER_CHECKS`.

    Args:
        solver: registered name, instance, or class or function that makes one.
        linear_only: the solver solves affine equations only.
        without: checks to leave out, by name, each with the reason why it cannot hold.

    Returns:
        One :class:`Result` for each check, none of them failed.

    Raises:
        AssertionError: with a line for each check that failed.
        UnknownNameError: ``without`` has a check that does not exist.
    """
    traits = {"linear_only": linear_only}
    return run_checks("solver", SOLVER_CHECKS, solver, without or {}, traits)


def check_adjoint(
    adjoint: str | Adjoint | Callable[[], Adjoint],
    *,
    exact: bool | None = None,
    through_loop: bool = False,
    without: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run every check of :data:`ADJOINT_CHECKS`.

    Args:
        adjoint: registered name, instance, or class or function that makes one.
        exact: hold it to exact derivatives; by default, what its class declares.
        through_loop: it differentiates the iterations, so that its memory grows with them and the
            starting state may get a gradient.
        without: checks to leave out, by name, each with the reason why it cannot hold.

    Returns:
        One :class:`Result` for each check, none of them failed.

    Raises:
        AssertionError: with a line for each check that failed.
        UnknownNameError: ``without`` has a check that does not exist.
    """
    traits = {"exact": exact, "through_loop": through_loop}
    return run_checks("adjoint", ADJOINT_CHECKS, adjoint, without or {}, traits)
