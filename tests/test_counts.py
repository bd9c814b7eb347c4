"""What a solve costs, in operations and evaluations: counts that are the same on every machine."""

from __future__ import annotations

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import twnn_plugin as tw
from tests import problems
from twnn_plugin import kernels
from twnn_plugin.adjoints.equation import Equation
from twnn_plugin.solvers import Control, driver
from twnn_plugin.solvers.masked import drive_masked
from twnn_plugin.state import Layout

VIEWS = {"view", "detach", "alias", "t", "transpose", "expand", "unsqueeze", "squeeze", "select", "unbind"}


class Operations(TorchDispatchMode):
    """Counts operations that do work (views do none), and those on whole states."""

    def __init__(self, width: int = -1):
        super().__init__()
        self.width = width
        self.names: collections.Counter[str] = collections.Counter()
        self.wide = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.wide += any(t.dim() == 2 and t.shape[1] == self.width for t in tensors)
        return out

    @property
    def total(self) -> int:
        return self.names.total()


def per_iteration(solver, every: int = 1, size: int = 40, norm: str = "l2") -> tuple[float, float]:
    """Operations, and operations on whole states, that a solver adds to one evaluation of f."""
    p = problems.vector(batch=6, size=size, norm=0.999)
    w, x = p.parameters[0].detach(), p.context[0]

    def count(iterations: int) -> Operations:
        layout, z = Layout.of(p.z0)
        equation = Equation(lambda z, x: torch.tanh(torch.addmm(x, z, w)), layout, (x,), 6)
        # A tolerance that no row meets.
        control = Control(tol=1e-300, max_iter=iterations, stop="abs" if norm == "max" else "rel", norm=norm)
        with torch.no_grad(), Operations(size) as operations:
            if every == 1:
                driver.drive(solver, equation, z, control)
            else:
                drive_masked(solver, equation, z, control, every)
        return operations

    few, many = count(20), count(40)  # both past the start, both with the same share of looks back
    f_own = 2
    return (many.total - few.total) / 20 - f_own, (many.wide - few.wide) / 20 - f_own


@pytest.mark.parametrize(
    ("solver", "most", "most_wide"),
    [
        # torchdeq: 36 for plain iteration, 48 for anderson, 65 for broyden.
        (tw.solver("picard"), 12, 3),
        (tw.solver("anderson"), 46, 22.3),  # .3: what is measured once, when acceleration begins
        (tw.solver("anderson", memory=5), 61, 32.3),
    ],
    ids=["picard", "anderson", "anderson-5"],
)
def test_operations_of_an_iteration(solver, most, most_wide):
    with kernels.disabled():
        total, wide = per_iteration(solver)
    assert 0 < total <= most, total
    assert 0 < wide <= most_wide, wide


@pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")
@pytest.mark.parametrize(("solver", "most"), [("picard", 0), ("anderson", 3)])
def test_operations_of_an_iteration_by_the_kernels(solver, most):
    total, wide = per_iteration(tw.solvers.get(solver)())  # what is left is memory: an iterate, a residual
    assert total <= most and wide <= 2.2, (total, wide)


def test_operations_of_an_iteration_without_looks_of_the_host():
    total, wide = per_iteration(tw.solver("picard"), every=5)
    assert 0 < total <= 26, total
    assert 0 < wide <= 5, wide


def test_a_plain_state_goes_to_f_as_it_is():
    layout, z = Layout.of(torch.zeros(3, 4))
    assert layout.unpack(z) is z
    assert layout.pack(z, 3) is z
    with Operations() as operations:
        layout, z = Layout.of(torch.zeros(3, 4, 5))
        layout.pack(layout.unpack(z), 3)
    assert set(operations.names) <= {"zeros"}


def test_finishing_costs_by_the_event_and_not_by_the_row():
    def count(batch: int) -> int:
        x = torch.linspace(0.5, 1, batch, dtype=torch.float64)[:, None].repeat(1, 3)
        layout, z = Layout.of(torch.zeros_like(x))
        equation = Equation(lambda z, x: 0.5 * x + 0.0 * z, layout, (x,), batch)
        with torch.no_grad(), Operations() as operations:
            driver.drive(tw.solver("picard"), equation, z, Control(1e-6, 50))
        return operations.total

    assert count(4) == count(64)


@pytest.mark.parametrize(
    ("make", "solver", "rows"),
    [
        (problems.vector, "picard", 222),
        (problems.vector, "anderson", 89),
        (problems.mixed, "picard", 299),
        (problems.mixed, "anderson", 135),
        (problems.non_symmetric, "anderson", 79),
        (problems.affine, "anderson", 77),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_evaluated(make, solver, rows):
    p = make()
    with torch.no_grad():
        solution = tw.fix(p.f, p.z0, *p.context, solver=solver, tol=1e-8, max_iter=500)
    assert bool(solution.converged.all())
    # Rounding may move a row across its tolerance by an evaluation; more is a change of the method.
    assert abs(solution.evaluations - rows) <= 0.06 * rows, solution.evaluations
