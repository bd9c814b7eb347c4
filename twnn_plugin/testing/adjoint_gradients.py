"""Checks of an adjoint's first derivatives and of its reports."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import adjoints
from ..types import Status
from . import problems
from .case import AdjointCase, adjoint_check, close, options_are_checked
from .problems import Problem, flatten, relative
from .solver_results import take

__all__ = ["cotangent_of"]


def cotangent_of(problem: Problem) -> Any:
    """A fixed random cotangent of the structure and shapes of the problem's state."""
    flat = flatten(problem.z0)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(7), dtype=flat.dtype)
    return problems.unflatten(noise, problem.z0)


@adjoint_check
def gradients(case: AdjointCase) -> None:
    """Gradients of parameters and context agree with dense linear algebra on every problem."""
    case.needs_exact()
    for make in problems.EVERY:
        problem = make()
        cotangent = cotangent_of(problem)
        _, parameters, x = problems.reference(problem, cotangent)
        solution, got = case.gradients(problem, cotangent)
        assert bool(solution.converged.all()), f"{problem.name}: {solution.describe()}"
        for a, b in zip(got, [*parameters, x], strict=True):
            error = relative(a, b)
            assert error < 1e-6, f"{problem.name}: a gradient is off by {error:.2g}"


@adjoint_check
def every_input_gets_its_gradient(case: AdjointCase) -> None:
    """Modules, tensors computed before the call, and every context tensor: all get gradients.

    By the chain rule, so that it holds for approximate adjoints, too.
    """
    problem = problems.vector(norm=0.5)
    (w,), (x,), cotangent = problem.parameters, problem.context, cotangent_of(problem)
    _, (of_w, of_x) = case.gradients(problem, cotangent)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(8, 8, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(w.T)
    offset = torch.zeros_like(x, requires_grad=True)
    scaled, shifted = scale * w, 1.0 * x + scale - 1.0
    closed = Problem(
        "closure", lambda z, y, o: torch.tanh(z @ scaled + y + o), 0 * x, (shifted, offset), (scale,)
    )
    solution = case.fix(closed)
    of_scale, of_offset = torch.autograd.grad((solution.value * cotangent).sum(), [scale, offset])
    expected = (of_w * w.detach()).sum() + of_x.sum()
    close(of_scale, expected, 1e-6, "the gradient of what closed-over and context tensors are made from")
    close(of_offset, of_x, 1e-6, "the gradient of the second context tensor", atol=1e-9)
    module = replace(problem, f=lambda z, x: torch.tanh(layer(z) + x))
    solution = case.fix(module)
    (of_layer,) = torch.autograd.grad((solution.value * cotangent).sum(), layer.weight)
    close(of_layer, of_w.T, 1e-6, "the gradient of a module's weight", atol=1e-9)


@adjoint_check
def report(case: AdjointCase) -> None:
    """After the backward pass the solution holds a report: name, exactness, and facts per row."""
    case.needs_equation()
    problem = problems.mixed(batch=10)
    solution, _ = case.gradients(problem, cotangent_of(problem), tol=1e-8)
    told = solution.adjoint
    assert told is not None, "no report was left after the backward pass"
    assert told.exact == type(case.adjoint).exact, "the report and the class disagree about exactness"
    assert isinstance(told.name, str) and told.name, "the report has no name"
    for what in (told.status, told.steps, told.residual):
        assert what.shape == (10,), f"a report of shape {tuple(what.shape)} for 10 rows"
    assert int(told.steps.min()) >= 1 and told.evaluations >= int(told.steps.sum()), "products not counted"
    if case.exact:
        good = told.status == int(Status.converged)
        assert bool(good.all()), f"statuses {told.status.tolist()} on contractions"
        assert bool((told.residual <= 1e-8 * (1 + 1e-6)).all()), "a residual above the tolerance"
    before = len(solution.reports)
    assert before == 1, f"{before} reports after one backward pass"


@adjoint_check
def converged_means_right(case: AdjointCase) -> None:
    """Rows reported converged, forward and backward, have the right gradient: no silent failure.

    On slow maps with budgets that end early, where failure is allowed but must be reported.
    """
    case.needs_exact()
    case.needs_equation()
    for make in (lambda: problems.mixed(hardest=0.999), problems.non_symmetric, problems.rotation):
        for max_iter in (4, 12, 60):
            problem = make()
            cotangent = cotangent_of(problem)
            solution, got = case.gradients(problem, cotangent, tol=1e-7, max_iter=max_iter, solver="broyden")
            _, _, x = problems.reference(problem, cotangent)
            told = solution.adjoint
            assert told is not None, "no report was left after the backward pass"
            good = solution.converged & (told.status == int(Status.converged))
            off = ((got[-1] - x).norm(dim=1) / x.norm(dim=1))[good]
            assert bool((off < 1e-3).all()), (
                f"{problem.name}: rows reported converged are off by {off.max():.2g}"
            )


@adjoint_check
def tolerance_is_relative(case: AdjointCase) -> None:
    """A loss scaled by 1e-6 or 1e-12 has the scaled gradient: the tolerance follows the incoming one."""
    problem = problems.mixed(batch=8)
    cotangent = cotangent_of(problem)
    _, whole = case.gradients(problem, cotangent, tol=1e-6)
    for scale in (1e-6, 1e-12, 1e6):
        _, scaled = case.gradients(problem, scale * cotangent, tol=1e-6)
        for a, b in zip(scaled, whole, strict=True):
            error = relative(a / scale, b)
            assert error < 1e-9, f"the loss times {scale:g} changes the gradient's direction by {error:.2g}"


@adjoint_check
def broken_rows_stay_out(case: AdjointCase) -> None:
    """A NaN or inf row does not reach the weights, or other rows, of a loss that ignores it."""
    problem = problems.mixed(batch=6, hardest=0.8)
    good = torch.arange(6) != 3
    cotangent = cotangent_of(problem) * good[:, None]

    def gradients_of(p: Problem) -> list[Tensor]:
        x = p.context[0].clone().requires_grad_()
        solution = case.fix(replace(p, context=(x, *p.context[1:])))
        loss = (solution.value[good] * cotangent[good]).sum()
        return list(torch.autograd.grad(loss, [*p.parameters, x]))

    clean = gradients_of(problem)
    for p in (problems.poisoned(problem, 3, math.nan), _overflowing(problem, 3)):
        w, x = gradients_of(p)
        close(w, clean[0], 1e-6, f"the weight gradient beside a row of {p.name}", atol=1e-10)
        close(x[good], clean[1][good], 1e-6, f"gradients of rows beside one of {p.name}", atol=1e-10)


def _overflowing(problem: Problem, row: int) -> Problem:
    # tanh(inf) is finite; here the map itself overflows, and so does its derivative.
    lift = torch.zeros_like(problem.context[1])
    lift[row] = 1e4

    def f(z: Tensor, x: Tensor, rate: Tensor, lift: Tensor) -> Tensor:
        return problem.f(z, x, rate) * torch.exp(lift * (1 + z**2))

    return replace(problem, name="infinity", f=f, context=(*problem.context, lift))


@adjoint_check
def initial_state(case: AdjointCase) -> None:
    """The starting state has no influence on the fixed point: its gradient is zero or None."""
    case.needs_equation()
    problem = problems.vector(norm=0.5)
    z0 = torch.full_like(problem.z0, 0.3).requires_grad_()
    value = case.fix(replace(problem, z0=z0)).value
    (got,) = torch.autograd.grad(value.sum(), z0, allow_unused=True)
    assert got is None or not bool(got.any()), "the starting state gets a gradient"


@adjoint_check
def memory(case: AdjointCase) -> None:
    """What is saved for the backward pass does not grow with the iterations."""
    case.needs_equation()
    counts = []
    for max_iter in (10, 80):
        problem = problems.vector(norm=0.99)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            solution = case.fix(problem, solver="picard", tol=1e-14, max_iter=max_iter)
        assert int(solution.steps.max()) == max_iter
        counts.append((len(saved), sum(t.numel() for t in saved)))
    assert counts[0] == counts[1], f"tensors and numbers saved after 10 and 80 iterations: {counts}"


@adjoint_check
def value(case: AdjointCase) -> None:
    """The value is that without gradients; nothing is recorded where nothing wants a gradient."""
    problem = problems.mixed()
    graded = case.fix(problem, tol=1e-8)
    with torch.no_grad():
        plain = case.fix(problem, tol=1e-8)
    close(graded.value.detach(), plain.value, 1e-12, "the value with and without gradients", atol=1e-13)
    assert graded.value.requires_grad and not plain.value.requires_grad
    (w,) = problem.parameters
    still = replace(problem, f=lambda z, x, rate: torch.tanh(rate * (z @ w.detach()) + x))
    assert not case.fix(still, tol=1e-8).value.requires_grad, "a graph although nothing wants a gradient"


@adjoint_check
def backward_twice(case: AdjointCase) -> None:
    """A retained graph gives the same gradient again, and so does the same call."""
    problem = problems.vector(norm=0.6)
    first, second = case.fix(problem), case.fix(problem)
    got = [
        torch.autograd.grad(solution.value.sum(), problem.parameters, retain_graph=True)[0]
        for solution in (first, first, second)
    ]
    assert torch.equal(got[0], got[1]), "a second backward pass gives another gradient"
    assert torch.equal(got[0], got[2]), "a second call gives another gradient"


@adjoint_check
def neighbours_of_gradients(case: AdjointCase) -> None:
    """The gradient of a row's context does not depend on the other rows."""
    problem = problems.by_rows()
    cotangent = cotangent_of(problem)
    _, (*_, together) = case.gradients(problem, cotangent)
    for row in (0, 3, 7):
        _, (*_, alone) = case.gradients(take(problem, [row]), cotangent[[row]])
        close(together[row], alone[0], 1e-6, f"the gradient of row {row} in the batch and alone", atol=1e-10)


@adjoint_check
def gradient_dtypes(case: AdjointCase) -> None:
    """Half-precision and autocast gradients keep the dtype and are near those of float64."""
    exact = problems.conv_cell()
    _, (expected, _) = case.gradients(exact, cotangent_of(exact))
    for dtype, tol, allowed in (
        (torch.float32, 1e-6, 1e-3),
        (torch.bfloat16, 1e-2, 0.15),
        (torch.float16, 1e-2, 0.1),
    ):
        problem = problems.conv_cell(dtype=dtype)
        _, (got, x) = case.gradients(problem, cotangent_of(exact).to(dtype), tol=tol, max_iter=60)
        assert got.dtype == dtype and x.dtype == dtype, f"{dtype} became {got.dtype} and {x.dtype}"
        error = relative(got.double(), expected)
        assert error < allowed, f"{dtype}: the gradient is off by {error:.2g}"
    problem = problems.conv_cell(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = case.fix(problem, tol=1e-2, max_iter=60)
    loss = (solution.value * cotangent_of(exact).float()).sum()
    (got,) = torch.autograd.grad(loss, problem.parameters)
    error = relative(got.double(), expected)
    assert got.dtype == torch.float32 and error < 0.15, f"autocast: {got.dtype}, off by {error:.2g}"


@adjoint_check
def empty_and_single(case: AdjointCase) -> None:
    """An empty batch has a zero gradient; a batch of one works."""
    for batch in (0, 1):
        problem = problems.vector(batch=batch, norm=0.5)
        x = problem.context[0].clone().requires_grad_()
        solution = case.fix(replace(problem, context=(x,)))
        if not batch and not solution.value.requires_grad:
            continue  # nothing was computed from the weights, so there is nothing to differentiate
        got = torch.autograd.grad(solution.value.sum(), [*problem.parameters, x], allow_unused=True)
        for gradient in got:
            if not batch:
                assert gradient is None or not bool(gradient.any()), "an empty batch has a gradient"
            else:
                assert gradient is not None and bool(gradient.any()), "a batch of one has none"


@adjoint_check
def gradients_leave_inputs_alone(case: AdjointCase) -> None:
    """Neither the incoming gradient nor any input is written to."""
    problem = problems.mixed(batch=5)
    cotangent = cotangent_of(problem)
    tensors = [problem.z0, *problem.context, *problem.parameters, cotangent]
    before = [tensor.detach().clone() for tensor in tensors]
    solution = case.fix(problem)
    torch.autograd.grad(solution.value, problem.parameters, cotangent)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"


@adjoint_check
def adjoint_options(case: AdjointCase) -> None:
    """Unknown, NaN, negative and fractional options raise :class:`~twnn_plugin.OptionError`."""
    assert pickle.loads(pickle.dumps(case.adjoint)) == case.adjoint, "a pickled copy differs"
    options_are_checked(case.adjoint, adjoints.registry)
