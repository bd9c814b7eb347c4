"""The loop over a thousand tiny layers as one node of the graph: the same numbers in half the time.

At eight features a layer is a few microseconds of arithmetic, and most of the time of training goes into
the bookkeeping of autograd. Here the layers run without it, and what does not depend on their order (the
slopes of tanh, the gradients of all weights) is done for all of them at once. For dense layers with tanh and
weights of their own; the networks are evaluated by the propagators themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twnn_plugin.blocks.propagation import Antisymmetric, Euler, Propagator, Verlet

__all__ = ["propagate"]


def propagate(chain: Propagator, x: Tensor) -> Tensor:
    """``chain(x)`` for x of (B, features), to be differentiated once."""
    assert chain.kernel_size is None and not chain.shared and isinstance(chain.activation, nn.Tanh)
    assert chain.bias is not None
    if isinstance(chain, Verlet):
        y, z = chain.parts(chain.enter(x))
        b, c = chain.bias.split(list(chain.matrix), dim=1)
        return chain.join(_Verlet.apply(y, z, chain.weight, b, c, chain.h))  # type: ignore[arg-type]
    assert isinstance(chain, (Antisymmetric, Euler))
    weight = chain.matrices() if isinstance(chain, Antisymmetric) else chain.weight
    made = _Euler.apply(x, weight, chain.bias, chain.h)
    assert isinstance(made, Tensor)
    return made


class _Euler(torch.autograd.Function):
    """``y <- y + h tanh(A y + b)`` for stacked A (N, n, n) and b (N, n)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor, b: Tensor, h: float) -> Tensor:
        states = y.new_empty(len(a) + 1, *y.shape)
        values = y.new_empty(len(a), *y.shape)
        states[0] = y
        path = states.unbind(0)
        for now, after, t, matrix, shift in zip(
            path, path[1:], values.unbind(0), a.mT.unbind(0), b.unbind(0), strict=False
        ):
            torch.addmm(shift, now, matrix, out=t).tanh_()
            torch.add(now, t, alpha=h, out=after)
        ctx.h = h
        ctx.save_for_backward(states, values, a)
        return path[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        states, values, a = ctx.saved_tensors
        slopes = _slopes(values, ctx.h)
        for slope, matrix in zip(reversed(slopes.unbind(0)), reversed(a.unbind(0)), strict=True):
            g = torch.addmm(g, slope.mul_(g), matrix)
        return g, torch.bmm(slopes.mT, states[:-1]), slopes.sum(dim=1), None


class _Verlet(torch.autograd.Function):
    """``z <- z - h tanh(K^T y + c)``, ``y <- y + h tanh(K z + b)``: K (N, n, m), b (N, n), c (N, m)."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, k: Tensor, b: Tensor, c: Tensor, h: float
    ) -> tuple[Tensor, Tensor]:
        ys, zs = y.new_empty(len(k) + 1, *y.shape), z.new_empty(len(k) + 1, *z.shape)
        ts, ss = torch.empty_like(ys[1:]), torch.empty_like(zs[1:])
        ys[0], zs[0] = y, z
        y_path, z_path = ys.unbind(0), zs.unbind(0)
        layers = zip(
            ts.unbind(0), ss.unbind(0), k.unbind(0), k.mT.unbind(0), b.unbind(0), c.unbind(0), strict=True
        )
        for j, (t, s, matrix, transposed, b_j, c_j) in enumerate(layers):
            torch.addmm(c_j, y_path[j], matrix, out=s).tanh_()
            torch.sub(z_path[j], s, alpha=h, out=z_path[j + 1])
            torch.addmm(b_j, z_path[j + 1], transposed, out=t).tanh_()
            torch.add(y_path[j], t, alpha=h, out=y_path[j + 1])
        ctx.h = h
        ctx.save_for_backward(ys, zs, ts, ss, k)
        return y_path[-1].clone(), z_path[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ys, zs, ts, ss, k = ctx.saved_tensors
        gy, gz = cotangents
        on_y, on_z = _slopes(ts, ctx.h), _slopes(ss, -ctx.h)
        layers = zip(on_y.unbind(0), on_z.unbind(0), k.unbind(0), k.mT.unbind(0), strict=True)
        for t, s, matrix, transposed in reversed(list(layers)):
            gz = torch.addmm(gz, t.mul_(gy), matrix)
            gy = torch.addmm(gy, s.mul_(gz), transposed)
        gk = torch.bmm(on_y.mT, zs[1:]) + torch.bmm(ys[:-1].mT, on_z)
        return gy, gz, gk, on_y.sum(dim=1), on_z.sum(dim=1), None


def _slopes(values: Tensor, h: float) -> Tensor:
    """``h tanh'`` where tanh has these values."""
    return values.square().sub_(1).mul_(-h)
