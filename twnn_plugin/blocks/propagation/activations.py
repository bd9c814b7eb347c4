"""Activations by name, and their antiderivatives, which make up a propagator's energy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import OptionError, UnknownNameError, nearest

__all__ = ["NAMES", "Activation", "antiderivative", "resolve"]

Activation = str | nn.Module
"""A name of :data:`NAMES`, or a module that works element by element."""

_CLASSES: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
)
_BY_NAME = {kind.__name__.lower(): kind for kind in _CLASSES}
NAMES = tuple(sorted(_BY_NAME))
"""The element-wise activations of torch.nn that draw no random numbers, in lower case."""

_NODES = 64


def resolve(activation: Activation) -> nn.Module:
    """The module of a name, such as ``"tanh"`` or ``"leaky_relu"``; a module stays as it is.

    Raises:
        UnknownNameError: a name that is not in :data:`NAMES`.
        OptionError: neither a name nor a module.
    """
    if isinstance(activation, nn.Module):
        return activation
    if not isinstance(activation, str):
        got = activation.__name__ if inspect.isclass(activation) else type(activation).__name__
        raise OptionError(
            f"An activation is given by name or as a module, such as nn.Tanh(); got {got}. Names: "
            f"{', '.join(NAMES)}."
        )
    key = activation.lower().replace("_", "")
    if key not in _BY_NAME:
        raise UnknownNameError(
            f"Unknown activation {activation!r}.{nearest(key, NAMES)} Names: {', '.join(NAMES)}."
        )
    return _BY_NAME[key]()


def antiderivative(activation: nn.Module, v: Tensor) -> Tensor:
    """``F(v)`` with ``F' = activation``, element by element: like ``v``.

    ``F(0) = 0``, but for the sigmoid, whose antiderivative here is the softplus, which is positive.
    Closed forms for tanh, ReLU, identity and sigmoid; for the others ``v`` times the integral of
    ``activation(t v)`` over [0, 1] by Gauss-Legendre quadrature with 64 nodes.
    """
    closed = _CLOSED.get(type(activation))
    if closed is not None:
        return closed(v)
    nodes, weights = (a.to(v) for a in _gauss())
    total = torch.zeros_like(v)
    for node, weight in zip(nodes, weights, strict=True):
        total = total + weight * activation(node * v)
    return v * total


def _log_cosh(v: Tensor) -> Tensor:
    a = v.abs()  # log cosh a = a - log 2 + log(1 + exp(-2 a)), but that cancels near zero
    return torch.where(a < 1e-2, a.square() / 2 - a**4 / 12, a + F.softplus(-2 * a) - math.log(2))


_CLOSED: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: _log_cosh,
    nn.ReLU: lambda v: v.relu().square() / 2,
    nn.Identity: lambda v: v.square() / 2,
    nn.Sigmoid: F.softplus,
}


@cache
def _gauss() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1] (Golub & Welsch 1969), float64."""
    k = torch.arange(1, _NODES, dtype=torch.float64, device="cpu")
    beta = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return (nodes + 1) / 2, vectors[0].square()
