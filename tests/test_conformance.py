"""The conformance suite: every registered solver and adjoint passes it, and faulty ones do not."""

from __future__ import annotations

import math
import unittest

import pytest
import torch

import twnn_plugin as tw
from tests import broken
from tests.methods import BRIDGED, NATIVE
from twnn_plugin import testing
from twnn_plugin.solvers import linear
from twnn_plugin.testing.adjoint_transforms import right_or_raises

THROUGH_LOOP = {"unrolled", "checkpointed"}
"""Adjoints that differentiate the iterations; on tightly converged solves they are exact, too."""


LINEAR_CHECKS = (
    "gradients",
    "report",
    "converged_means_right",
    "tolerance_is_relative",
    "broken_rows_stay_out",
    "neighbours_of_gradients",
    "gradient_dtypes",
    "empty_and_single",
    "second_derivatives",
)
"""What the solver of an adjoint's linear equation has a part in."""


def traits(adjoint: str) -> dict[str, bool]:
    return {"exact": True, "through_loop": True} if adjoint in THROUGH_LOOP else {}


def crossed(names, checks):
    return [pytest.param(name, check, id=f"{name}-{check}") for name in names for check in checks]


def faults(table):
    pairs = [(fault, check) for fault, checks in table.items() for check in checks]
    return [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}") for pair in pairs]


@pytest.mark.parametrize(("solver", "check"), crossed([*NATIVE, *BRIDGED], testing.SOLVER_CHECKS))
def test_solver(solver, check):
    testing.SOLVER_CHECKS[check](solver)


@pytest.mark.parametrize(("adjoint", "check"), crossed(tw.adjoints.names(), testing.ADJOINT_CHECKS))
def test_adjoint(adjoint, check):
    testing.ADJOINT_CHECKS[check](adjoint, **traits(adjoint))


@pytest.mark.parametrize("check", LINEAR_CHECKS)
@pytest.mark.parametrize("solver", linear.names())
def test_implicit_with_each_linear_solver(solver, check):
    testing.ADJOINT_CHECKS[check](tw.adjoint("implicit", solver=solver))


def test_the_checks_of_linear_solvers_exist():
    assert set(LINEAR_CHECKS) <= set(testing.ADJOINT_CHECKS)


# The suite finds what it looks for.


@pytest.mark.parametrize(("fault", "check"), faults(broken.SOLVERS))
def test_a_faulty_solver_fails_its_check(fault, check):
    with pytest.raises(AssertionError):
        testing.SOLVER_CHECKS[check](fault)


@pytest.mark.parametrize(("fault", "check"), faults(broken.ADJOINTS))
def test_a_faulty_adjoint_fails_its_check(fault, check):
    with pytest.raises(AssertionError):
        testing.ADJOINT_CHECKS[check](fault)


def test_the_sound_twins_of_the_faulty_ones_pass():
    """So that it is the fault that is found, and not the form that the twins share."""
    results = testing.check_solver(broken.Plain)
    assert {r.name for r in results} == set(testing.SOLVER_CHECKS)
    unlike = (broken.Hooked, broken.TakesAnyTolerance)
    for check in {c for fault, checks in broken.ADJOINTS.items() for c in checks if fault not in unlike}:
        testing.ADJOINT_CHECKS[check](broken.Hooked)


TRANSFORMS = {name for name in testing.ADJOINT_CHECKS if name.startswith("func_")} | {"batched_backward"}


def test_every_check_has_a_fault_that_it_finds():
    """A check that no faulty plugin fails might be one that cannot fail."""
    proven = {check for checks in (*broken.SOLVERS.values(), *broken.ADJOINTS.values()) for check in checks}
    everything = {*testing.SOLVER_CHECKS, *testing.ADJOINT_CHECKS}
    assert everything - proven == TRANSFORMS


def test_right_or_raises():
    """What the checks of the transforms rest on."""
    one = torch.ones(3)
    assert right_or_raises(lambda: one, one, "same")
    assert not right_or_raises(lambda: torch.linalg.solve(torch.zeros(3, 3), one), one, "raises")
    for wrong in (1.1 * one, torch.zeros(3), torch.ones(4), math.nan * one, None):
        with pytest.raises(AssertionError, match=r"silently|shape"):
            right_or_raises(lambda w=wrong: w, one, "wrong")
    with pytest.raises(IndexError):
        right_or_raises(lambda: [][1], one, "a crash is no refusal")


def test_the_runner_lists_every_failure_and_every_skip():
    with pytest.raises(AssertionError) as caught:
        testing.check_solver(broken.Hoards)
    assert "1 of" in str(caught.value) and "bounded_memory: the history grew" in str(caught.value)
    reason = "keeps all residuals on purpose"
    results = testing.check_solver(broken.Hoards, without={"bounded_memory": reason})
    skipped = {r.name: r.message for r in results if r.outcome == "skipped"}
    assert skipped["bounded_memory"] == reason
    assert "no options" in skipped["options"]
    with pytest.raises(tw.UnknownNameError, match="Did you mean 'bounded_memory'"):
        testing.check_solver("picard", without={"bounded_memry": reason})


def test_a_check_that_does_not_apply_is_a_skip_for_unittest_and_pytest():
    assert issubclass(testing.NotApplicable, unittest.SkipTest)
    with pytest.raises(testing.NotApplicable, match="exact"):
        testing.ADJOINT_CHECKS["gradients"]("one_step")
    with pytest.raises(AssertionError, match="gradient is off"):
        testing.ADJOINT_CHECKS["gradients"]("one_step", exact=True)
    with pytest.raises(TypeError, match="linaer_only"):
        testing.SOLVER_CHECKS["dtypes"]("picard", linaer_only=True)


def test_solvers_of_affine_equations_are_checked_on_affine_maps_alone():
    class LooksForCurvature(broken.Plain):
        def step(self, problem, z, fz, r, state):
            probe = problem.evaluate(0 * z) + problem.evaluate(2 * z) - 2 * problem.evaluate(z)
            bound = 1e-6 * (1 + problem.evaluate(0 * z).nan_to_num().abs().max())
            assert float(probe.nan_to_num().abs().max()) < bound, "the map is not affine"
            return fz, None

    for name in ("solves_contractions", "structures", "neighbours", "frozen_rows", "coupled_rows"):
        try:
            testing.SOLVER_CHECKS[name](LooksForCurvature, linear_only=True)
        except AssertionError as error:
            assert "not affine" not in str(error), name
