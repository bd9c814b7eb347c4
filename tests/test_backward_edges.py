"""Backward passes under circumstances that are rare, and in which a wrong gradient would go unnoticed."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import twnn_plugin as tw

ADJOINTS = ["implicit", "ad_fixed_point", "unrolled", "checkpointed", "phantom", "one_step"]
WEIGHT = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
    0
]


def weight(scale: float) -> torch.Tensor:
    return (scale * WEIGHT).requires_grad_()


def settled(f, *context, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        return tw.fix(f, torch.zeros_like(context[0]), *context, **options)


@pytest.mark.parametrize("adjoint", ["implicit", "one_step", "unrolled", "checkpointed", "phantom"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "auto"])
def test_a_row_that_diverges_leaves_the_gradient_of_the_weights_alone(adjoint, solver):
    """It stays finite itself; what it would become after it was given up is none of the others' affair."""
    w, x = weight(0.9), torch.ones(8, 4, dtype=torch.float64)
    growth = torch.tensor([1.0] * 7 + [2.0], dtype=torch.float64)[:, None]

    def f(z, x, growth):
        return torch.where(growth > 1, z * z * (w.sum() + 9) + 9 + x, z @ w + x)

    alone = settled(f, x[:7], growth[:7], solver=solver, adjoint=adjoint, tol=1e-9, max_iter=300)
    beside = settled(f, x, growth, solver=solver, adjoint=adjoint, tol=1e-9, max_iter=300)
    assert beside.converged.tolist() == [True] * 7 + [False]
    (expected,) = torch.autograd.grad(alone.value.square().sum(), w)
    (found,) = torch.autograd.grad(beside.value[:7].square().sum(), w)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
@pytest.mark.parametrize("layers", [1, 2])
def test_inside_a_checkpoint_a_solve_is_repeated_once(adjoint, layers):
    calls = []
    w, x = weight(0.9), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def f(z, x):
        calls.append(z.shape[0])
        return torch.tanh(z @ w + x)

    def network(x):
        for _ in range(layers):
            x = settled(f, x, adjoint=adjoint, tol=1e-10, max_iter=300).value
        return x

    def gradients(run):
        calls.clear()
        out = run()
        forward = len(calls)
        return torch.autograd.grad(out.square().sum(), (w, x)), forward, len(calls) - forward

    expected, _, plain = gradients(lambda: network(x))
    found, forward, backward = gradients(lambda: checkpoint(network, x, use_reentrant=False))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert backward <= forward + plain + 2 * layers, (forward, plain, backward)


def test_inside_a_checkpoint_a_function_of_its_context_alone_has_its_gradient():
    x = torch.ones(3, 4, requires_grad=True)
    value = checkpoint(lambda x: settled(lambda z, c: 2 * c, x).value, x, use_reentrant=False)
    value.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3, 4), 2.0))


def test_a_function_that_writes_to_the_memory_it_returned_is_refused():
    out, w = torch.empty(3, 4, dtype=torch.float64), 0.5 * WEIGHT.numpy()

    def f(z):
        np.tanh(z.numpy() @ w + 1, out=out.numpy())  # out of torch's sight
        return out

    for solver in ("picard", "anderson", "broyden", "newton_krylov", "auto"):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(tw.MapError, match=r"\.clone\(\)"):
                tw.fix(f, torch.zeros(3, 4, dtype=torch.float64), solver=solver)
    with torch.no_grad():
        copied = tw.fix(lambda z: f(z).clone(), torch.zeros(3, 4, dtype=torch.float64), tol=1e-8)
    assert bool(copied.converged.all())


def test_a_constant_is_a_fixed_point_and_stays_the_callers():
    constant = torch.randn(3, 4)
    with torch.no_grad():
        solution = tw.fix(lambda z: constant, torch.zeros(3, 4))
        same = tw.fix(lambda z: z, torch.ones(3, 4))
    assert torch.equal(solution.value, constant) and torch.equal(same.value, torch.ones(3, 4))
    solution.value.add_(1)
    assert not torch.equal(solution.value, constant)


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "checkpointed", "phantom"])
def test_a_step_of_the_optimiser_before_the_backward_pass_raises(adjoint):
    layer = nn.Linear(4, 4)
    nn.init.orthogonal_(layer.weight, 0.7)
    x = torch.randn(6, 4, requires_grad=True)
    solution = tw.fix(lambda z, x: torch.tanh(layer(z) + x), torch.zeros(6, 4), x, adjoint=adjoint)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified"):
        solution.value.sum().backward()


def test_a_backward_pass_inside_autocast_is_made_in_the_dtype_of_the_forward_pass():
    w, x = weight(0.8).detach().float(), torch.randn(6, 4, requires_grad=True)

    def gradient(inside):
        solution = settled(lambda z, x: torch.tanh(z @ w + x), x, tol=1e-6, max_iter=300)
        loss = solution.value.square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(loss, x)[0]  # whose last product has no matrix in it

    assert torch.equal(gradient(True), gradient(False))


def test_a_weight_that_f_no_longer_finds_gets_its_gradient_where_second_ones_are_refused():
    class Box:
        weight = weight(0.3)

    box, x = Box(), torch.randn(6, 4, dtype=torch.float64)
    first = box.weight

    def gradient(create_graph):
        box.weight = first
        solution = settled(lambda z, x: torch.tanh(z @ box.weight + x), x, tol=1e-10, max_iter=200)
        box.weight = first.detach()  # the same values, a constant now
        return torch.autograd.grad(
            solution.value.square().sum(), first, create_graph=create_graph, allow_unused=True
        )[0]

    expected, found = gradient(False), gradient(True)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        found.sum().backward()


@pytest.mark.parametrize("kind", ["detach", "data"])
def test_what_is_taken_off_the_graph_inside_f_stays_off_in_second_derivatives(kind):
    x = torch.randn(3, 4, dtype=torch.float64)

    def cell(z, w):
        constant = w.detach() if kind == "detach" else w.data
        return torch.tanh(0.4 * z @ constant + 0.3 * z @ w + x)

    def iterated(w):
        z = torch.zeros_like(x)
        for _ in range(120):
            z = cell(z, w)
        return z

    def fixed(w):
        return tw.fix(lambda z: cell(z, w), torch.zeros_like(x), tol=1e-13, max_iter=400).value

    def second(run):
        w = weight(0.5)
        (g,) = torch.autograd.grad(run(w).square().sum(), w, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    torch.testing.assert_close(second(fixed), second(iterated), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", tw.adjoints.names())
def test_states_without_entries_have_gradients_without_entries(adjoint):
    x = torch.zeros(2, 0, requires_grad=True)
    w = torch.ones((), requires_grad=True)
    solution = tw.fix(lambda z, x: torch.tanh(w * z + x), torch.zeros(2, 0), x, adjoint=adjoint)
    solution.value.sum().backward()
    assert x.grad is not None and x.grad.shape == (2, 0)
    assert w.grad is not None and float(w.grad) == 0.0


def test_the_jacobian_of_a_state_without_entries():
    def solve(x):
        return tw.fix(lambda z, x: torch.tanh(0.1 * z + x), torch.zeros(2, 0), x).value

    assert torch.func.jacfwd(solve)(torch.zeros(2, 0)).shape == (2, 0, 2, 0)
    assert torch.func.jacrev(solve)(torch.zeros(2, 0)).shape == (2, 0, 2, 0)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda run, x: torch.autograd.functional.jacobian(run, x, vectorize=True),
        lambda run, x: torch.autograd.functional.jacobian(run, x, vectorize=True, strategy="forward-mode"),
        lambda run, x: torch.autograd.functional.hessian(lambda x: run(x).sum(), x, vectorize=True),
    ],
    ids=["reverse", "forward", "hessian"],
)
def test_vectorised_derivatives_say_what_to_use_instead(derivative):
    w = weight(0.2).detach()
    with pytest.raises(tw.TransformError, match=r"torch\.func"):
        derivative(
            lambda x: tw.fix(lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), x).value,
            torch.randn(3, 4, dtype=torch.float64),
        )


# Where no row is finite ------------------------------------------------------------------------------


def viewed(z, c, w):
    """A map that cannot take an empty batch."""
    return torch.tanh(z.view(z.shape[0], -1) @ w).view_as(z) + c


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("kind", ["at once", "later", "with its derivative"])
def test_where_no_row_is_finite_the_map_is_given_no_empty_batch(adjoint, kind):
    w, start = weight(0.2), torch.zeros(3, 4, dtype=torch.float64)
    x = torch.full_like(start, math.nan if kind == "at once" else 1e200).requires_grad_()

    def f(z, c):
        grown = viewed(z, c, w)
        return grown if kind == "at once" else grown + z * c

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        solution = tw.fix(f, start, x, adjoint=adjoint, solver="picard", norm="max")
    assert bool((solution.status != tw.Status.converged).all())
    gradients = torch.autograd.grad(
        solution.value.nansum(), (w, x), create_graph=kind == "with its derivative"
    )
    assert all(float(gradient.detach().abs().sum()) == 0.0 for gradient in gradients)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_derivative_of_an_empty_batch_has_one_itself(adjoint):
    w = weight(0.2)
    x = torch.zeros(0, 4, dtype=torch.float64)
    solution = tw.fix(lambda z, c: torch.tanh(z @ w + c), x, x, adjoint=adjoint)
    (gradient,) = torch.autograd.grad(solution.value.sum(), w, create_graph=True)
    assert gradient.shape == w.shape and float(gradient.detach().abs().sum()) == 0.0
