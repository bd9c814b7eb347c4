"""Checks of what an adjoint leaves alone: the forward solve, other calls, ``.grad``, torch's settings."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..types import Iteration, Status
from . import problems
from .adjoint_gradients import cotangent_of
from .case import AdjointCase, adjoint_check, close, quiet_fix
from .problems import Problem
from .solver_manners import leaves_settings_alone

__all__: list[str] = []


def _sums(problem: Problem, value: Tensor) -> Tensor:
    return (value * cotangent_of(problem)).sum()


@adjoint_check
def forward_solve(case: AdjointCase) -> None:
    """The forward solve is the one that was asked for: its solver, tolerance, budget and callback."""
    problem = problems.mixed(batch=8)
    for solver in ("picard", "anderson"):
        for options in ({"tol": 1e-4, "max_iter": 200}, {"tol": 1e-9, "max_iter": 7}):
            shown: list[Iteration] = []
            with torch.no_grad():
                plain = quiet_fix(problem, solver=solver, **options)
            graded = case.fix(problem, solver=solver, callback=shown.append, **options)
            what = f"with solver={solver!r}, {options}"
            for name in ("status", "steps"):
                ours, theirs = getattr(graded, name).tolist(), getattr(plain, name).tolist()
                assert ours == theirs, f"{what}: {name} {ours} with gradients, {theirs} without"
            close(graded.residual, plain.residual, 1e-6, f"{what}: residuals", atol=1e-15)
            close(graded.value.detach(), plain.value, 1e-12, f"{what}: values", atol=1e-13)
            assert shown and shown[-1].step == int(plain.steps.max()), f"{what}: the callback is not called"


@adjoint_check
def calls_do_not_mix(case: AdjointCase) -> None:
    """Two solves of one instance, differentiated afterwards in either order, do not know of each other."""
    pair = [problems.vector(norm=0.5, seed=seed) for seed in (0, 5)]

    def gradient(problem: Problem, value: Tensor) -> Tensor:
        return torch.autograd.grad(_sums(problem, value), problem.parameters)[0]

    expected = [gradient(problem, case.fix(problem).value) for problem in pair]
    for order in ((0, 1), (1, 0)):
        values = [case.fix(problem).value for problem in pair]
        for i in order:
            what = f"the gradient of solve {i + 1} of 2, differentiated in the order {order}"
            close(gradient(pair[i], values[i]), expected[i], 1e-9, what, atol=1e-12)
    values = [case.fix(problem).value for problem in pair]
    total = sum(_sums(problem, value) for problem, value in zip(pair, values, strict=True))
    assert isinstance(total, Tensor)
    both = torch.autograd.grad(total, [problem.parameters[0] for problem in pair])
    for got, alone in zip(both, expected, strict=True):
        close(got, alone, 1e-9, "the gradient of a loss over two solves", atol=1e-12)


def _rates(rates: list[float]) -> Problem:
    """rate * z + x: the gradient in the context x is the solution of the adjoint's equation."""
    x = problems.affine(batch=len(rates)).context[0]
    rate = torch.tensor(rates, dtype=torch.float64)[:, None]
    w = torch.ones(x.shape[1], dtype=torch.float64, requires_grad=True)
    return Problem("rates", lambda z, x, rate: rate * w * z + x, torch.zeros_like(x), (x, rate), (w,))


@adjoint_check
def tolerance_of_rows(case: AdjointCase) -> None:
    """A hard row whose incoming gradient is 1e-9 of the others' is solved to the tolerance as they are.

    A norm over the batch would not see it.
    """
    problem = _rates([0.1, 0.1, 0.1, 0.95])
    cotangent = torch.ones_like(problem.z0)
    scale = torch.tensor([[1.0], [1.0], [1.0], [1e-9]], dtype=torch.float64)
    _, (_, whole) = case.gradients(problem, cotangent, tol=1e-8)
    _, (_, scaled) = case.gradients(problem, scale * cotangent, tol=1e-8)
    error = problems.relative(scaled[3] / scale[3], whole[3])
    assert error < 1e-5, f"an incoming gradient of 1e-9 of the other rows' changes the row's by {error:.2g}"


@adjoint_check
def contexts_of_any_kind(case: AdjointCase) -> None:
    """Integer and bool context reaches ``f`` as it is; a tensor that is context twice counts twice."""
    base = problems.vector(norm=0.5)
    (w,), (x,) = base.parameters, base.context
    number, odd = torch.arange(len(x)), torch.arange(len(x)) % 2 == 1
    table = torch.linspace(0.2, 0.8, len(x), dtype=torch.float64)

    def f(z: Tensor, x: Tensor, number: Tensor, odd: Tensor, again: Tensor) -> Tensor:
        moved = table[number][:, None] * (z @ w) + 0.5 * x + 0.5 * again
        return torch.where(odd[:, None], torch.tanh(moved), 0.5 * moved)

    def plain(z: Tensor, x: Tensor) -> Tensor:
        return f(z, x, number, odd, x)

    gradients = []
    for g, context in ((f, (number, odd)), (plain, ())):
        leaf = x.clone().requires_grad_()
        given = (leaf, *context, leaf) if context else (leaf,)
        # Without context no row leaves, so that what is closed over fits.
        problem = Problem("kinds", g, base.z0, given, (w,))
        if not context:
            problem = replace(problem, f=lambda z, leaf=leaf: plain(z, leaf), context=())
        value = case.fix(problem).value
        gradients.append(torch.autograd.grad(_sums(base, value), [w, leaf]))
    for name, got, expected in zip(("weights", "context"), *gradients, strict=True):
        close(
            got, expected, 1e-6, f"the gradient of the {name}, with integer, bool and repeated context", 1e-9
        )


@adjoint_check
def only_asked_gradients(case: AdjointCase) -> None:
    """``torch.autograd.grad`` fills no ``.grad``, and nobody's ``requires_grad`` changes."""
    problem = problems.vector(norm=0.5)
    (w,), (x,) = problem.parameters, problem.context
    bystander = torch.zeros_like(x)
    f = lambda z, x, b: problem.f(z, x) + b  # noqa: E731
    leaf = x.clone().requires_grad_()
    solution = case.fix(replace(problem, f=f, context=(leaf, bystander)))
    torch.autograd.grad(_sums(problem, solution.value), leaf, retain_graph=True)
    torch.autograd.grad(_sums(problem, solution.value), w)
    for name, tensor in (("weights", w), ("context", leaf), ("second context tensor", bystander)):
        assert tensor.grad is None, f"the .grad of the {name} was written to by torch.autograd.grad"
    assert not bystander.requires_grad, "a context tensor was made to require a gradient"


@adjoint_check
def any_incoming_gradient(case: AdjointCase) -> None:
    """Incoming gradients that are expanded, transposed or zero give what their plain copies give."""
    problem = problems.vector(norm=0.5)
    value = case.fix(problem).value
    dense = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape[::-1])
    kinds = {
        "expanded": torch.ones((), dtype=value.dtype).expand_as(value),
        "transposed": dense.t(),
        "zero": torch.zeros_like(value),
        "zero in a row": torch.cat([torch.zeros_like(value[:1]), torch.ones_like(value[1:])]),
    }
    for kind, g in kinds.items():
        (got,) = torch.autograd.grad(value, problem.parameters, g, retain_graph=True)
        (expected,) = torch.autograd.grad(value, problem.parameters, 1e-3 * g.clone(), retain_graph=True)
        close(got, 1e3 * expected, 1e-6, f"an incoming gradient that is {kind}", atol=1e-10)
        assert kind != "zero" or not bool(got.any()), "a zero gradient comes back as another one"


class _Seen(torch.autograd.Function):
    """The identity; counts the rows of each product with the Jacobian."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, seen: Tensor) -> Tensor:
        ctx.index, ctx.seen = index, seen
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.seen.index_add_(0, ctx.index, torch.ones_like(ctx.index))
        return g, None, None


@adjoint_check
def counted_products(case: AdjointCase) -> None:
    """No fewer products with the Jacobian are reported than were made; the report comes with the first."""
    case.needs_equation()
    problem = problems.mixed(batch=8)
    seen = torch.zeros(8, dtype=torch.long)

    def f(z: Tensor, x: Tensor, rate: Tensor, index: Tensor) -> Tensor:
        return problem.f(_Seen.apply(z, index, seen), x, rate)  # type: ignore[arg-type]

    solution = case.fix(replace(problem, f=f, context=(*problem.context, torch.arange(8))), tol=1e-6)
    assert solution.adjoint is None, "there is a report of a backward solve that has not run"
    torch.autograd.grad(_sums(problem, solution.value), problem.parameters)
    told = solution.adjoint
    assert told is not None, "no report was left after the backward pass"
    made = int(seen.sum())
    # One more product a row may come with the gradients of weights and context.
    assert told.evaluations >= made - 8, f"{told.evaluations} products reported, {made} made"
    fewest = int((told.steps - seen).max())
    assert not case.exact or fewest <= 1, f"steps {told.steps.tolist()}, products made {seen.tolist()}"


@adjoint_check
def reported_residuals(case: AdjointCase) -> None:
    """The residual told of each row is no smaller than it is, evaluated anew."""
    case.needs_exact()
    case.needs_equation()
    problem = _rates([0.1, 0.3, 0.6, 0.8, 0.95])
    g = torch.linspace(0.5, 1.5, problem.z0.numel(), dtype=torch.float64).view_as(problem.z0)
    rate = problem.context[1]
    for max_iter in (500, 12):
        solution, (_, u) = case.gradients(problem, g, tol=1e-4, max_iter=max_iter)
        told = solution.adjoint
        assert told is not None, "no report was left after the backward pass"
        good = told.status == int(Status.converged)
        true = ((rate * u + g - u).norm(dim=1) / g.norm(dim=1))[good]
        low = true > told.residual[good].double() * (1 + 1e-4) + 1e-14
        assert not bool(low.any()), (
            f"rows called converged have residuals of {true[low].tolist()}; the report says "
            f"{told.residual[good][low].tolist()}"
        )


@adjoint_check
def errors_pass_through(case: AdjointCase) -> None:
    """What ``f`` raises in the forward solve reaches the caller."""

    class Stop(Exception):
        pass

    problem = problems.vector(norm=0.5)

    def failing(after: int) -> Callable[..., Tensor]:
        calls = 0

        def f(z: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Stop
            return problem.f(z, x)

        return f

    for after in (0, 2):
        try:
            case.fix(replace(problem, f=failing(after)))
        except Stop:
            continue
        raise AssertionError(f"what f raises in evaluation {after + 1} is swallowed")


@adjoint_check
def nothing_stays_behind(case: AdjointCase) -> None:
    """Settings of torch stay as they were, and an instance keeps no tensor of a finished call."""
    problem = problems.vector(norm=0.5)
    x = problem.context[0].clone().requires_grad_()
    watch = weakref.ref(x)
    with leaves_settings_alone():
        solution = case.fix(replace(problem, context=(x,)))
        torch.autograd.grad(_sums(problem, solution.value), [*problem.parameters, x])
    del x, solution
    gc.collect()
    assert watch() is None, "the context of a finished call is still referred to"
