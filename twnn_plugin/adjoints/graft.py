"""Attaching a gradient to a state that was solved for without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers import Outcome
from ..types import Status
from .equation import Call

__all__ = ["Tape", "graft"]


class _Source(torch.autograd.Function):
    """The state as the start of a graph: products with its Jacobian end here, gradients do too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class _Graft(torch.autograd.Function):
    """Value ``z``; gradient: what ``pull`` makes of the incoming one, handed to ``fz``."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, pull: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pull = pull
        ctx.save_for_backward(fz)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (fz,) = ctx.saved_tensors
        with torch.no_grad():
            u = ctx.pull(grads[0])
        if torch.is_grad_enabled():  # create_graph=True
            u = _Refuse.apply(u, fz, grads[0])
        return u, None, None


class _Refuse(torch.autograd.Function):
    """Identity on ``u`` that cannot be differentiated.

    ``u`` depends on everything that ``fz`` and g depend on. They are inputs here so that any second
    derivative passes through this node and raises, instead of missing that dependence silently.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "This adjoint of fix gives first derivatives only: trying to differentiate twice. Use "
            "adjoint='unrolled', whose derivatives of any order are right."
        )


class Tape:
    """``f`` evaluated once with a graph at given states, for products with its Jacobian.

    Args:
        call: the equation.
        z: (b, D) states.
        rows: (b,) their indices in the batch; None: all of them, in order.
        attached: whether the graph reaches the context (for the last product) or the state alone.
    """

    def __init__(self, call: Call, z: Tensor, rows: Tensor | None, attached: bool):
        self.equation = call.equation(rows)
        if not attached:
            self.equation.context = tuple(c.detach() for c in self.equation.context)
        with torch.enable_grad():
            self.z = _Source.apply(z.detach().requires_grad_())
            self.fz = self.equation.evaluate(self.z)
        call.evaluations += self.equation.evaluations

    def pull(self, u: Tensor) -> Tensor:
        """``J^T u`` for a (b, D) matrix of cotangents."""
        (product,) = torch.autograd.grad(
            self.fz, self.z, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def reaches_a_leaf(self) -> bool:
        """Whether the value depends on anything, besides the state, that wants a gradient."""
        assert isinstance(self.z, Tensor)
        seen, stack = {self.z.grad_fn}, [self.fz.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name().endswith("AccumulateGrad"):
                return True
            stack.extend(parent for parent, _ in node.next_functions)
        return False


def graft(call: Call, outcome: Outcome, pull: Callable[[Tape, Tensor, Tensor | None], Tensor]) -> Outcome:
    """Give the outcome's value a gradient by one evaluation of ``f`` with a graph.

    Rows with non-finite values stay out of that evaluation: through the weights they would make
    every gradient NaN, even that of a loss that ignores them (0 * NaN is NaN).

    Args:
        call: the equation.
        outcome: its solution, without a graph.
        pull: makes of (tape, g, rows) the cotangent that ``f``'s own backward is given; g is (b, D)
            and rows are the (b,) indices in the batch, or None for all.
    """
    if not torch.is_grad_enabled() or outcome.value.numel() == 0:
        return outcome
    broken = outcome.status == int(Status.non_finite)
    if call.settled is not None:  # rows that nobody solved for, and so nobody looked at
        broken = broken | ~torch.isfinite(outcome.value).all(dim=1)
    rows = torch.nonzero(~broken).flatten() if bool(broken.any()) else None
    if rows is not None and rows.numel() == 0:
        return outcome
    z = outcome.value if rows is None else outcome.value[rows]
    tape = Tape(call, z, rows, attached=True)
    if not tape.reaches_a_leaf():
        return outcome
    value = _Graft.apply(tape.fz, z, lambda g: pull(tape, g, rows))
    if rows is not None:
        value = outcome.value.index_copy(0, rows, value)
    return Outcome(value, outcome.status, outcome.steps, outcome.residual)
