"""Checks of derivatives beyond ``.backward()``: second order, forward mode, ``torch.func``.

Each holds a result against a plain loop differentiated to machine precision. What an adjoint does not
support must raise; a wrong number fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import problems
from .case import AdjointCase, adjoint_check
from .problems import Problem, relative

__all__: list[str] = []

_STEPS = 80  # of norm 0.5: to 1e-24


def _tensors() -> tuple[Tensor, Tensor]:
    problem = problems.vector(batch=3, size=4, norm=0.5, symmetric=False)
    return problem.parameters[0].detach(), problem.context[0]


def _map(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, x: torch.tanh(z @ w + x)


def _loop(w: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(_STEPS):
        z = torch.tanh(z @ w + x)
    return z


def _fixed(case: AdjointCase) -> Callable[[Tensor, Tensor], Tensor]:
    def solve(w: Tensor, x: Tensor) -> Tensor:
        problem = Problem("vector", _map(w), torch.zeros_like(x), (x,), ())
        return case.fix(problem, tol=1e-13, max_iter=200).value

    return solve


def _loss(z: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, z.numel(), dtype=z.dtype).view(z.shape)
    return (weights * z**3).sum()


def right_or_raises(attempt: Callable[[], Any], expected: Any, what: str, allowed: float = 1e-6) -> bool:
    """Whether ``attempt`` is supported; a result that differs from ``expected`` fails.

    Args:
        attempt: makes a tensor or a tuple of tensors.
        expected: what it must be.
        what: for messages.
        allowed: relative error.

    Returns:
        False where it raised what an unsupported combination may raise: ``RuntimeError``,
        ``NotImplementedError`` or ``ValueError`` and their subclasses.
    """
    try:
        got = attempt()
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    got, expected = (value if isinstance(value, tuple) else (value,) for value in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, Tensor), f"{what}: silently {a!r} instead of a derivative"
        assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
        error = relative(a.detach(), b.detach())
        assert error < allowed, f"{what}: silently wrong, by {error:.2g}"
    return True


@adjoint_check
def second_derivatives(case: AdjointCase) -> None:
    """Double backward, in weights and context, is right or raises."""
    case.needs_exact()

    def second(solve: Callable[[Tensor, Tensor], Tensor], inner: int, outer: int) -> Tensor:
        leaves = [tensor.clone().requires_grad_() for tensor in _tensors()]
        (first,) = torch.autograd.grad(_loss(solve(*leaves)), leaves[inner], create_graph=True)
        return torch.autograd.grad((first**2).sum(), leaves[outer])[0]

    for inner in (0, 1):
        for outer in (0, 1):
            names = ("weights", "context")
            what = f"the derivative in the {names[outer]} of the gradient in the {names[inner]}"
            right_or_raises(
                lambda i=inner, o=outer: second(_fixed(case), i, o), second(_loop, inner, outer), what
            )


@adjoint_check
def third_derivatives(case: AdjointCase) -> None:
    """Backward three times is right or raises."""
    case.needs_exact()

    def third(solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        w, x = (tensor.clone().requires_grad_() for tensor in _tensors())
        (first,) = torch.autograd.grad(_loss(solve(w, x)), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), w, create_graph=True)
        return torch.autograd.grad((second**2).sum(), x)[0]

    right_or_raises(lambda: third(_fixed(case)), third(_loop), "the third derivative")


@adjoint_check
def gradient_penalty(case: AdjointCase) -> None:
    """A loss made of the gradient and the value together trains right or raises."""
    case.needs_exact()

    def penalty(solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        w, x = (tensor.clone().requires_grad_() for tensor in _tensors())
        z = solve(w, x)
        (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        return torch.autograd.grad(_loss(z) + (first * z).sum(), w)[0]

    right_or_raises(lambda: penalty(_fixed(case)), penalty(_loop), "the gradient of a gradient penalty")


def _backward(case: AdjointCase, argnum: int) -> Tensor:
    """The gradient by ``.backward()``; for approximate adjoints that is what transforms must agree with."""
    leaves = [tensor.clone().requires_grad_() for tensor in _tensors()]
    solve = _loop if case.exact else _fixed(case)
    return torch.autograd.grad(_loss(solve(*leaves)), leaves[argnum])[0]


@adjoint_check
def func_grad(case: AdjointCase) -> None:
    """``torch.func.grad`` and ``torch.func.vjp``, in weights and context, are right or raise."""
    w, x = _tensors()
    solve = _fixed(case)
    for argnum in (0, 1):
        expected = _backward(case, argnum)
        attempt = torch.func.grad(lambda w, x: _loss(solve(w, x)), argnums=argnum)
        right_or_raises(lambda a=attempt: a(w, x), expected, f"torch.func.grad in argument {argnum}")

    def pulled() -> Any:
        value, pull, *_ = torch.func.vjp(solve, w, x)
        return pull(torch.func.grad(_loss)(value))

    right_or_raises(pulled, (_backward(case, 0), _backward(case, 1)), "torch.func.vjp")


@adjoint_check
def func_grad_of_a_closure(case: AdjointCase) -> None:
    """``torch.func.grad`` in the context also where ``f`` closes over a module with parameters."""
    w, x = _tensors()
    layer = torch.nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(w.T)

    def loss(x: Tensor) -> Tensor:
        problem = Problem("module", lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(x), (x,), ())
        return _loss(case.fix(problem, tol=1e-13, max_iter=200).value)

    what = "torch.func.grad with a module in f"
    right_or_raises(lambda: torch.func.grad(loss)(x), _backward(case, 1), what)


def _tangents() -> tuple[Tensor, Tensor]:
    w, x = _tensors()
    return w.flip(0), x.flip(1)


def _forward_expectation(case: AdjointCase) -> Callable[[Tensor], bool]:
    """Whether a tangent is right: the derivative itself, or, of an approximate adjoint, its transpose's."""
    exact = torch.func.jvp(_loop, _tensors(), _tangents())[1]
    leaves = [tensor.clone().requires_grad_() for tensor in _tensors()]
    z = _fixed(case)(*leaves)
    g = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape)
    pulled = torch.autograd.grad((g * z).sum(), leaves)
    product = sum(float((a * b).sum()) for a, b in zip(pulled, _tangents(), strict=True))

    def right(tangent: Tensor) -> bool:
        transposed = abs(float((g * tangent).sum()) - product) < 1e-6 * abs(product)
        return relative(tangent, exact) < 1e-6 or (not case.exact and transposed)

    return right


@adjoint_check
def func_jvp(case: AdjointCase) -> None:
    """``torch.func.jvp`` and dual numbers are right or raise; a lost tangent is wrong."""
    right = _forward_expectation(case)
    solve = _fixed(case)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(p, t) for p, t in zip(_tensors(), _tangents(), strict=True)]
            tangent = forward_ad.unpack_dual(solve(*inputs)).tangent
            assert tangent is not None, "dual numbers: the tangent is silently lost"
            return tangent.clone()

    attempts = {
        "torch.func.jvp": lambda: torch.func.jvp(solve, _tensors(), _tangents())[1],
        "dual numbers": dual,
        "dual numbers under no_grad": lambda: torch.no_grad()(dual)(),
    }
    for what, attempt in attempts.items():
        try:
            tangent = attempt()
        except (RuntimeError, NotImplementedError, ValueError):
            continue
        assert right(tangent), f"{what}: the tangent is silently wrong"


@adjoint_check
def func_jacobians(case: AdjointCase) -> None:
    """``jacrev``, ``jacfwd`` and ``hessian`` of a small problem are right or raise."""
    case.needs_exact()
    w, x = _tensors()
    solve = _fixed(case)
    for name in ("jacrev", "jacfwd"):
        transform = getattr(torch.func, name)
        expected = transform(_loop, argnums=1)(w, x)
        right_or_raises(lambda t=transform: t(solve, argnums=1)(w, x), expected, f"torch.func.{name}")
    expected = torch.func.hessian(lambda x: _loss(_loop(w, x)))(x)
    attempt = torch.func.hessian(lambda x: _loss(solve(w, x)))
    right_or_raises(lambda: attempt(x), expected, "torch.func.hessian")


@adjoint_check
def func_vmap(case: AdjointCase) -> None:
    """``vmap`` over context or weights, of values and of gradients, is right or raises."""
    w, x = _tensors()
    ws, xs = torch.stack([w, -w, 0.5 * w]), torch.stack([x, 2 * x, -x])
    solve = _fixed(case)
    values = {(0, None): (ws, x), (None, 0): (w, xs), (0, 0): (ws, xs)}
    for dims, inputs in values.items():
        expected = torch.func.vmap(_loop, in_dims=dims)(*inputs)
        what = f"vmap with in_dims={dims}"
        right_or_raises(lambda d=dims, i=inputs: torch.func.vmap(solve, in_dims=d)(*i), expected, what)
        if case.exact:
            both = torch.func.grad(lambda w, x: _loss(_loop(w, x)), argnums=(0, 1))
            expected = torch.func.vmap(both, in_dims=dims)(*inputs)
            ours = torch.func.vmap(torch.func.grad(lambda w, x: _loss(solve(w, x)), (0, 1)), in_dims=dims)
            what = f"vmap of grad with in_dims={dims}"
            right_or_raises(lambda f=ours, i=inputs: f(*i), expected, what)


@adjoint_check
def batched_backward(case: AdjointCase) -> None:
    """``is_grads_batched`` (vmap over cotangents) is right or raises."""
    leaves = [tensor.clone().requires_grad_() for tensor in _tensors()]
    z = _fixed(case)(*leaves)
    cotangents = torch.randn(3, *z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    one_by_one = [torch.autograd.grad(z, leaves, g, retain_graph=True) for g in cotangents]
    expected = tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True))

    def attempt() -> Any:
        return torch.autograd.grad(z, leaves, cotangents, is_grads_batched=True, retain_graph=True)

    right_or_raises(attempt, expected, "torch.autograd.grad(is_grads_batched=True)")
