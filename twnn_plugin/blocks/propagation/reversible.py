"""A backward pass that works the states out again from the last one instead of keeping them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Operator, State

__all__ = ["Invertible", "run_reversibly"]


class Invertible(Protocol):
    """Layers that can be undone."""

    def operators(self) -> list[Operator]:
        """One for each layer."""
        ...

    def step(self, state: State, operator: Operator) -> State:
        """One layer."""
        ...

    def unstep(self, state: State, operator: Operator) -> State:
        """The state that :meth:`step` came from."""
        ...


def run_reversibly(chain: Invertible, state: State) -> State:
    """The state after the last layer; its graph holds that state and the operators, nothing in between.

    Chang et al. (2018), "Reversible architectures for arbitrarily deep residual neural networks".
    """
    operators = chain.operators()
    # Layers that share their weights share one gradient: a thousand of them would not fit beside one state.
    once = {id(operator): operator for operator in operators}
    place = {key: index for index, key in enumerate(once)}
    order = [place[id(operator)] for operator in operators]
    flat = [tensor for operator in once.values() for tensor in operator]
    out = _Reversible.apply(chain, len(state), order, *state, *flat)
    assert isinstance(out, tuple)
    return out


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Invertible, parts: int, order: list[int], *tensors: Tensor) -> State:
        state: State = tensors[:parts]
        operators = _cut(tensors[parts:], order)
        for index in order:
            state = chain.step(state, operators[index])
        ctx.chain, ctx.parts, ctx.order = chain, parts, order
        kind = tensors[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*state, *tensors[parts:])
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        state: State = ctx.saved_tensors[: ctx.parts]
        operators = _cut(ctx.saved_tensors[ctx.parts :], ctx.order)
        grads: list[tuple[Tensor, ...]] = [()] * len(operators)
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            for index in reversed(ctx.order):
                operator, known = operators[index], grads[index]
                with torch.no_grad():
                    state = ctx.chain.unstep(state, operator)
                inputs = [tensor.detach().requires_grad_() for tensor in (*state, *operator)]
                with torch.enable_grad():
                    out = ctx.chain.step(tuple(inputs[: ctx.parts]), tuple(inputs[ctx.parts :]))
                found = torch.autograd.grad(out, inputs, cotangents)
                cotangents, mine = found[: ctx.parts], found[ctx.parts :]
                grads[index] = tuple(map(torch.add, known, mine)) if known else mine
        flat = [grad for mine in grads for grad in mine]
        return (None, None, None, *cotangents, *flat)


def _cut(flat: tuple[Tensor, ...], order: list[int]) -> list[Operator]:
    each = len(flat) // (max(order) + 1)
    return [flat[k : k + each] for k in range(0, len(flat), each)]
