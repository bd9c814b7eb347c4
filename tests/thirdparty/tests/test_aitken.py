"""The conformance suite of twnn_plugin, run on a solver from outside."""

import pytest
from twnn_example_plugin.solver import Aitken

from twnn_plugin import testing


@pytest.mark.parametrize("check", testing.SOLVER_CHECKS)
def test_aitken(check):
    testing.SOLVER_CHECKS[check](Aitken)
