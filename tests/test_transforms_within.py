"""``f`` may make transforms of its own: maps that are gradients of an energy, or written for one sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import twnn_plugin as tw

f64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


PACKED = 0.4 * draw(8, 4)
W, V = PACKED[:4], PACKED[4:]  # two tensors in one memory
X, T = draw(3, 4, seed=1), draw(3, 4, seed=2)


def energy(z, w):
    return torch.tanh(z @ w + V.sum() / 9).square().sum()


def by_gradient(z, w):
    return -0.2 * grad(lambda z: energy(z, w))(z)


def sample_by_sample(z, w):
    return 0.4 * vmap(lambda row: torch.tanh(w @ row))(z)


def columns(z, w):
    return 0.3 * vmap(lambda column: torch.sin(column), in_dims=1, out_dims=1)(z @ w)


def gradient_of_each(z, w):
    return -0.2 * vmap(grad(lambda row: energy(row, w)))(z)


def along(z, w):
    return 0.3 * jvp(lambda z: torch.sin(z @ w), (z,), (torch.cos(z),))[1]


def along_a_weight(z, w):
    return 0.3 * torch.tanh(z @ jvp(torch.sin, (w,), (w,))[1])


def back(z, w):
    value, pull = vjp(lambda z: torch.sin(z @ w), z)
    return 0.3 * pull(value)[0]


def twice(z, w):
    return 0.1 * vmap(hessian(lambda row: energy(row, w)))(z).sum(1)


MAPS = [by_gradient, sample_by_sample, columns, gradient_of_each, along, along_a_weight, back, twice]


def solved(f, x: Tensor, w: Tensor, adjoint: str) -> Tensor:
    solver = "ad_fixed_point" if adjoint == "ad_fixed_point" else "anderson"
    start = torch.zeros_like(x)
    return tw.fix(
        lambda z, x: f(z, w) + x, start, x, solver=solver, adjoint=adjoint, tol=1e-13, max_iter=300
    ).value


def iterated(f, x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(120):
        z = f(z, w) + x
    return z


def of_row(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda row, w: solve(row[None], w).sin().sum()


DERIVATIVES = {
    "grad by the weight": lambda solve: grad(lambda w: solve(X, w).sin().sum())(W),
    "jvp": lambda solve: jvp(lambda x: solve(x, W), (X,), (T,))[1],
    "jacfwd by the weight": lambda solve: jacfwd(lambda w: solve(X, w).sin().sum())(W),
    "jacrev": lambda solve: jacrev(lambda x: solve(x, W))(X),
    "hessian": lambda solve: hessian(of_row(solve))(X[0], W),
    "samples": lambda solve: vmap(grad(of_row(solve)), (0, None))(X, W),
    "ensemble": lambda solve: vmap(lambda w: solve(X, w))(torch.stack([W, 0.5 * W])),
}


@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("f", MAPS)
def test_derivatives_are_those_of_the_iteration(f, name, adjoint):
    derivative = DERIVATIVES[name]
    expected = derivative(lambda x, w: iterated(f, x, w))
    if f is along and name == "hessian":  # torch writes an expanded tangent of the jvp inside: it says so
        with pytest.raises(RuntimeError, match="single memory location"):
            derivative(lambda x, w: solved(f, x, w, adjoint))
        return
    torch.testing.assert_close(derivative(lambda x, w: solved(f, x, w, adjoint)), expected)


@pytest.mark.parametrize("f", MAPS)
def test_second_derivatives_by_backward(f):
    found = []
    for solve in (lambda x, w: solved(f, x, w, "implicit"), lambda x, w: iterated(f, x, w)):
        x, packed = X.clone().requires_grad_(), PACKED.clone().requires_grad_()
        first = torch.autograd.grad(solve(x, packed[:4]).sin().sum(), (x, packed), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, packed)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_closed_over_within_the_transform_has_its_derivative():
    """Two views of one memory, of which the transform returns something that lies in a third."""
    packed = PACKED.clone().requires_grad_()
    found = []
    for solve in (solved, iterated):
        w, v = packed[:4], packed[4:]

        def f(z, w=w, v=v):
            inner = vmap(lambda row: (w.t() @ row, w.t()))(z)[0]
            return 0.3 * torch.tanh(inner @ v)

        options = ("implicit",) if solve is solved else ()
        first = torch.autograd.grad(
            solve(lambda z, _, f=f: f(z), X, W, *options).sin().sum(), packed, create_graph=True
        )[0]
        found.append((first, torch.autograd.grad(first.square().sum(), packed)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_module_inside_of_a_transform():
    layer = torch.nn.Linear(4, 4).to(f64)
    layer.load_state_dict({"weight": W, "bias": V[0]})
    values = dict(layer.named_parameters())

    def solve(values, x, steps=None):
        f = lambda z, x: 0.4 * vmap(lambda row: torch.tanh(functional_call(layer, values, (row,))))(z) + x  # noqa: E731
        if steps is None:
            return tw.fix(f, torch.zeros_like(x), x, tol=1e-13, max_iter=200).value
        z = torch.zeros_like(x)
        for _ in range(steps):
            z = f(z, x)
        return z

    mine = jacrev(lambda values: solve(values, X).sin().sum())(values)
    expected = jacrev(lambda values: solve(values, X, steps=120).sin().sum())(values)
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value)


@pytest.mark.parametrize(
    "f",
    [
        lambda z, w: 0.2 * z @ grad(lambda w: torch.tanh(w).sum())(w),
        lambda z, w: 0.3 * torch.tanh(z @ vmap(torch.sin)(w)),
        lambda z, w: -0.2 * grad(energy)(z, w),  # all arguments are wrapped
    ],
)
def test_a_transform_that_is_given_a_weight_is_refused(f):
    with pytest.raises(tw.MapError, match="transform inside of f that is given more than what f computes"):
        jacrev(lambda x: solved(f, x, W, "implicit"))(X)
    value = solved(f, X.clone().requires_grad_(), W.clone().requires_grad_(), "implicit")
    value.sum().backward()  # a first derivative needs nothing of the kind


def test_a_second_derivative_of_a_transform_that_is_given_a_weight_is_refused():
    """Also where no transform is at work any more when it is asked for."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    value = solved(lambda z, w: -0.2 * grad(energy)(z, w), x, w, "implicit")
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="more than what f computes"):
        torch.autograd.grad(g.square().sum(), w)


def test_what_a_transform_around_f_wraps_is_another_tensor_than_the_one_inside():
    """The context is given as it is, and closed over as what is differentiated."""
    x = X[:1]

    def value(w, solve):
        return solve(lambda z, _: 0.3 * torch.tanh(z) * w, x, W).sin().sum()

    for transform in (grad, jacfwd, hessian):
        mine = transform(lambda w: value(w, lambda *a: solved(*a, "implicit")))(x)
        torch.testing.assert_close(mine, transform(lambda w: value(w, iterated))(x))
