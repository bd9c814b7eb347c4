"""Differentiating through the iterations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import transforms
from ..errors import TransformError
from ..solvers import Outcome
from ..trees import leaves, rebuild
from ..types import AdjointReport, State, Status
from .base import Adjoint
from .equation import Call
from .graft import of_nobody

__all__ = ["Unrolled"]


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through every iteration that was made.

    The exact derivative of the computed state, not of the fixed point: plain steps tend to that as the
    tolerance falls, those of an accelerated solver need not. Memory grows with the iterations. Derivatives of
    any order work, and the starting state gets a gradient. A row that is done where it starts has made no
    step: unless the start wants a gradient, it is evaluated once more and has that evaluation's gradient.
    """

    exact: ClassVar[bool] = False

    def run_transformed(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        # The iterates carry every level and tangent by themselves; instances of vmap would differ in steps.
        call.f = _one_at_once(call.f)
        return self.run(call, reports)

    def _solve(self, call: Call) -> Outcome:
        outcome = call.solve()
        if not torch.is_grad_enabled():
            return outcome
        broken = outcome.status == int(Status.non_finite)
        if not bool(broken.any()):
            return outcome
        if call.control.coupled:
            return _of_numbers(call, outcome, broken)
        if not call.context:
            return outcome
        if bool(broken.all()):  # no tensor need be found for torch.func to have its zeros
            constant = replace(outcome, value=outcome.value.detach())
            return constant if transforms.active() else of_nobody(call, outcome)
        # The evaluations of a row with NaN would make the gradient of every weight NaN, even that of a loss
        # which ignores the row: the others are solved for without it. They are independent of it.
        left_out = broken if call.settled is None else broken | call.settled
        others = replace(call, settled=left_out, evaluations=0, control=replace(call.control, callback=None))
        others.z0 = torch.where(left_out[:, None], outcome.value.detach(), call.z0)
        again = others.solve()
        call.evaluations += others.evaluations
        return replace(outcome, value=again.value)

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        outcome = self._solve(call)
        if not torch.is_grad_enabled():
            return outcome
        # Rows that no step was made of: one evaluation gives them their share of the gradient.
        still = outcome.steps <= 1
        which = torch.zeros_like(still) if call.settled is None else call.settled
        cut_off = outcome.status == int(Status.non_finite)  # whatever steps those rows made
        everywhere = not outcome.value.requires_grad and bool((still | cut_off).all())
        unmoved = transforms.constant(call.z0)
        if unmoved and (everywhere or outcome.value.requires_grad or transforms.active()):
            which = which | (still & (outcome.status == int(Status.converged)))
        if bool(which.any()) or (unmoved and everywhere and not call.z0.shape[0]):
            return _evaluated(call, outcome, which)
        return outcome


def _of_numbers(call: Call, outcome: Outcome, broken: Tensor) -> Outcome:
    """The outcome of coupled rows, with the gradient of zeros for what is not finite, where that is right.

    A row that is not finite stays in their batch, and makes NaN of the gradient of every weight that it is
    multiplied with, whatever its share. Where the others come to the same with zeros in its place, that is
    what they hear of it.
    """
    f, silent = call.f, replace(call.control, callback=None)

    def heard(z: State, *context: Tensor) -> State:
        return f(rebuild(z, lambda leaf: leaf.nan_to_num(0.0, 0.0, 0.0)), *context)

    numbers = replace(call, f=heard, evaluations=0, control=silent)
    again = numbers.solve()
    call.evaluations += numbers.evaluations
    alike = (again.value == outcome.value).all(dim=1)
    if not bool((alike | broken).all()):
        return outcome
    return replace(outcome, value=torch.where(broken[:, None], outcome.value.detach(), again.value))


def _one_at_once(f: Callable[..., State]) -> Callable[..., State]:
    """``f``, which may not be mapped over, by its inputs or by what it closes over."""

    def watched(z: State, *context: Tensor) -> State:
        value = f(z, *context)
        if any(isinstance(leaf, Tensor) and transforms.many(leaf) for leaf in leaves(value)):
            raise TransformError(
                "torch.vmap cannot map over adjoint='unrolled': how many steps are made depends on values. "
                "Use adjoint='implicit', or make one batch of the instances."
            )
        return value

    return watched


def _evaluated(call: Call, outcome: Outcome, which: Tensor) -> Outcome:
    """The outcome with the derivative of one more evaluation of ``f`` for some rows, (B,) bool.

    Their values stay, which are what the residuals are of: ``f`` may lead away from a row within a large
    tolerance.
    """
    rows = torch.nonzero(which).flatten()
    equation = call.equation(rows)
    value = equation.evaluate(outcome.value[rows])
    call.evaluations += equation.evaluations
    kept = outcome.value.detach()[rows] + (value - value.detach())
    return replace(outcome, value=outcome.value.index_copy(0, rows, kept))
