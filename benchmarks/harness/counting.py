"""Counting what is done: rows and products of a solve, multiply-adds and operations of anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import twnn_plugin.blocks.count  # noqa: F401  (adds formulas that torch lacks)

__all__ = ["Counts", "Executed", "counted"]

_VIEWS = {"view", "detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select"}
_VIEWS |= {"unbind", "split", "slice", "as_strided", "_unsafe_view", "_reshape_alias"}


class Executed(TorchDispatchMode):
    """Counts, while it is entered, the operations that reach kernels, and multiply-adds among them.

    Multiply-adds are those of convolutions, matrix products, attention and recurrent layers, forward and
    backward, by the formulas in torch's registry; nothing is estimated, so that work which a solver or a gate
    saves is not counted. Unlike ``FlopCounterMode`` it installs no hooks, which fail where a backward pass
    calls ``autograd.grad``.

    Attributes:
        multiply_adds: so far.
        operations: how often each operation ran; views, which do no work, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        out = func(*args, **kwargs)
        formula = flop_registry.get(packet)
        if formula is not None:
            self.multiply_adds += formula(*args, **kwargs, out_val=out) // 2
        name = packet.__name__
        if name not in _VIEWS:
            self.operations[name] += 1
        return out


@dataclass
class Counts:
    """Work done, in calls and in rows."""

    calls: int = 0
    rows: int = 0
    products: int = 0
    product_rows: int = 0


class _Watch(torch.autograd.Function):
    """Identity whose backward counts one vector-Jacobian product with respect to the state."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, counts: Counts) -> Tensor:
        ctx.counts = counts
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.counts.products += 1
        ctx.counts.product_rows += grads[0].shape[0]
        return grads[0], None


def counted(f: Callable[..., Any], counts: Counts) -> Callable[..., Any]:
    """``f`` with its work written down; the state is a tensor or a tuple of them, batch first.

    A product is counted where the gradient with respect to the state is computed, so a product that
    nobody uses is counted, too: it costs time all the same.
    """

    def watched(z: Any, *context: Tensor) -> Any:
        first = z if isinstance(z, Tensor) else z[0]
        counts.calls += 1
        counts.rows += first.shape[0]
        if isinstance(z, Tensor):
            return f(_Watch.apply(z, counts) if z.requires_grad else z, *context)
        if first.requires_grad:
            z = (_Watch.apply(first, counts), *z[1:])
        return f(z, *context)

    return watched
