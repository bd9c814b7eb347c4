"""The fixed-point operator as an autograd function whose derivatives are calls of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..solvers import Control, Outcome, Solver, solve
from ..types import AdjointReport, Status
from .by_parts import solve_by_parts
from .capture import announce, unwatched
from .graft import looked_into
from .linear import LinearSettings, Products, in_units, units_of
from .maps import Joint, Linear, Map, Pushed, Transposed, pull_inputs, push_inputs

__all__ = ["Method", "apply", "pull_back"]


@dataclass(frozen=True)
class Method:
    """How the equations of one call are solved: its own, and those of its derivatives.

    Attributes:
        solver: of the primal equation.
        control: its stopping rule.
        linear: how derivatives are solved for.
        joint: iterate primal and tangent together in forward mode.
        name: of the adjoint, for its reports.
        eps: relative rounding error of an evaluation.
        sizes: widths of the parts of the primal state.
        outcomes: the outcomes of primal solves are appended here, on plain tensors, whatever
            transformation is under way.
        evaluations: rows evaluated are appended here.
        reports: reports of derivative solves are appended here.
    """

    solver: Solver
    control: Control
    linear: LinearSettings
    joint: bool
    name: str
    eps: float
    sizes: tuple[int, ...]
    reports: list[AdjointReport]
    outcomes: list[Outcome] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)

    def solve(self, h: Map, z0: Tensor, inputs: Sequence[Tensor]) -> Outcome:
        """The fixed point of ``z -> h(z, *inputs)``, in the present grad mode."""
        if isinstance(h, Linear):
            return self._solve_linear(h, inputs)
        problem = _Equation(h, inputs, z0.shape[0])
        control = self.control
        if h.parts:  # another state than the user's
            control = replace(control, parts=h.parts, callback=None, seen=None)
        outcome = solve(self.solver, problem, z0, control)
        if h.parts:
            self._report(outcome, problem.evaluations)
        else:
            self.outcomes.append(outcome)
            self.evaluations.append(problem.evaluations)
        return outcome

    def _solve_linear(self, h: Linear, inputs: Sequence[Tensor]) -> Outcome:
        units = self._units(h, inputs)
        g = inputs[-1] if units is None else units * inputs[-1]

        def make() -> Products:
            kept, kept_units = list(inputs), units

            def renew(rows: Tensor) -> Any:
                nonlocal kept_units
                kept[:] = _gather(h, kept, rows)
                kept_units = None if kept_units is None else kept_units[rows]
                return in_units(h.product(kept), kept_units)

            product = in_units(h.product(inputs), units)
            return Products(product, g, self.eps, renew if h.can_leave else None)

        parts = (g.shape[1],) if units is None else self.sizes
        outcome, evaluations = solve_by_parts(make, self.linear, parts)
        self._report(outcome, evaluations)
        return outcome if units is None else replace(outcome, value=outcome.value / units)

    def parts_of(self, h: Map, width: int) -> tuple[int, ...]:
        """Widths of the parts of a map's state that must each settle."""
        if h.parts:
            return h.parts
        return self.sizes if sum(self.sizes) == width and self.control.stop == "rel" else (width,)

    def _units(self, h: Linear, inputs: Sequence[Tensor]) -> Tensor | None:
        """Of the equation's unknown: inverse to the state's for a cotangent, the state's for a tangent."""
        if inputs[0].shape[1] != sum(self.sizes):
            return None
        units = units_of(inputs[0], self.sizes)
        return units if units is None or isinstance(h, Transposed) else 1 / units

    def _report(self, outcome: Outcome, evaluations: int) -> None:
        report = AdjointReport(
            self.name, True, outcome.status, outcome.steps, outcome.residual, evaluations=evaluations
        )
        self.reports.append(report)


class _Equation:
    """A map and its inputs as a ``Problem``."""

    leave_share = 0.8

    def __init__(self, h: Map, inputs: Sequence[Tensor], size: int):
        self.h, self.inputs, self.size = h, list(inputs), size
        self.evaluations = 0
        self.can_leave = h.can_leave

    def evaluate(self, z: Tensor) -> Tensor:
        self.evaluations += self.size
        return self.h(z, *self.inputs)

    def keep(self, rows: Tensor) -> None:
        self.inputs = _gather(self.h, self.inputs, rows)
        self.size = rows.numel()


def _gather(h: Map, inputs: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [x[rows] if per_row else x for x, per_row in zip(inputs, h.per_row, strict=True)]


class _Fix(torch.autograd.Function):
    """``(z0, *inputs) -> z = h(z, *inputs)``; its derivatives are fixed points, found by itself."""

    @staticmethod
    def forward(h: Map, method: Method, z0: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outcome = method.solve(h, z0, inputs)
        # A result that is one of the arguments, or a part of one, would be taken for a view of it.
        given = any(outcome.value is x for x in (z0, *inputs))
        value = outcome.value.clone() if given or outcome.value._is_view() else outcome.value
        return value, outcome.status, outcome.steps, outcome.residual

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.h, ctx.method, *tensors = inputs
        value, *report = output
        ctx.mark_non_differentiable(*report)
        # An input without a tangent has none, rather than one of zeros: nothing is pushed through it, which
        # functions that cannot be differentiated with respect to it (running statistics) would refuse.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, report[0], *tensors)
        ctx.save_for_forward(value, report[0], *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        # A transform may have ended since the forward pass. An operation sheds what it wrapped tensors in,
        # which a transform that begins now would wrap again, and never be rid of.
        value, status, z0, *inputs = (saved.view_as(saved) for saved in ctx.saved_tensors)
        wanted = [i for i, wants in enumerate(ctx.needs_input_grad[3:]) if wants and _moves(inputs[i])]
        grads: list[Tensor | None] = [None] * len(inputs)
        with looked_into():
            pulled = pull_back(ctx.h, ctx.method, value, status, inputs, wanted, g)
        for i, grad in zip(wanted, pulled, strict=True):
            grads[i] = grad
        return None, None, torch.zeros_like(z0) if ctx.needs_input_grad[2] else None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None, None]:
        # torch runs this rule with forward mode off, which silently loses the tangents of outer levels
        # (a jvp of a jvp): on again, with this level's own tangents taken off.
        with forward_ad._set_fwd_grad_enabled(True), looked_into():
            primals = [forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
            return _push_forward(ctx.h, ctx.method, primals, tangents[3:]), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, h: Map, method: Method, z0: Tensor, *inputs: Tensor) -> Any:
        count = info.batch_size
        dims = in_dims[3:]
        mapped = h.aligned([dim is not None for dim in dims])
        z0 = _first(z0, in_dims[2], count)
        batch = z0.shape[1]
        laid = []
        for x, dim, rows, differs in zip(inputs, dims, h.per_row, mapped, strict=True):
            x = _first(x, dim, count) if rows or differs else x
            laid.append(x.flatten(0, 1) if rows else x)
        out = apply(h.stack(count, mapped), method, z0.flatten(0, 1), *laid)
        return tuple(x.unflatten(0, (count, batch)) for x in out), (0, 0, 0, 0)


def _push_forward(h: Map, method: Method, saved: Sequence[Tensor], tangents: Sequence[Any]) -> Tensor:
    """The tangent of the fixed point."""
    value, status, z0, *inputs = saved
    moving = [i for i, t in enumerate(tangents) if t is not None and _moves(inputs[i])]
    if not moving:
        return torch.zeros_like(value)
    chosen = [tangents[i] for i in moving]
    # A tangent has no unit of the state's that an absolute tolerance could be in: it is solved for by itself.
    if method.joint and method.control.stop == "rel" and not isinstance(h, Linear):
        start = torch.cat([z0, torch.zeros_like(z0)], dim=1)
        joint = Joint(h, method.parts_of(h, z0.shape[1]), moving)
        return apply(joint, method, start, *inputs, *chosen)[0][:, z0.shape[1] :]
    value, inputs, broken = _sound(h, method, value, status, inputs)
    with unwatched():
        r = torch.where(broken, 0.0, push_inputs(h, value, inputs, moving, chosen))
    v = apply(Pushed(h), method, r, value, *inputs, r)[0]
    return torch.where(broken, float("nan"), v)


def apply(h: Map, method: Method, z0: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fixed point (B, D) of ``z -> h(z, *inputs)``, its status, steps and residual.

    Differentiable any number of times, in either mode and under ``vmap``, with respect to ``inputs``; the
    derivative with respect to ``z0`` is zero.
    """
    with unwatched():
        out = _Fix.apply(h, method, z0, *inputs)
    announce(*out)
    return out  # type: ignore[return-value]


def pull_back(
    h: Map,
    method: Method,
    value: Tensor,
    status: Tensor,
    inputs: Sequence[Tensor],
    wanted: Sequence[int],
    g: Tensor,
) -> list[Tensor]:
    """Gradients of ``<g, z>`` for the inputs at the positions ``wanted``, z the fixed point ``value``."""
    if not wanted:
        return []
    value, inputs, broken = _sound(h, method, value, status, inputs)
    g = torch.where(broken, 0.0, g)
    u = apply(Transposed(h), method, g, value, *inputs, g)[0]
    with unwatched():
        grads = pull_inputs(h, value, inputs, wanted, u)
    nothing = broken.all()
    return [torch.where(nothing, 0.0, grad) for grad in grads]


def _sound(
    h: Map, method: Method, value: Tensor, status: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The rows with those that are not finite replaced by a good one, and which those are (B, 1).

    Through what rows share, a row with NaN would make every derivative NaN, whatever its share in it:
    zero times NaN is NaN. Coupled rows stay: with another row in its place the others' are other values.
    """
    broken = status == int(Status.non_finite)
    if method.linear.coupled:
        return value, list(inputs), broken[:, None]
    rows = torch.arange(value.shape[0], device=value.device)
    good = torch.where(broken, rows.numel(), rows).amin() if rows.numel() else rows.sum()
    rows = torch.where(broken & (good < rows.numel()), good, rows)
    sound = [x[rows] if per_row else x for x, per_row in zip(inputs, h.per_row, strict=True)]
    return value[rows], sound, broken[:, None]


def _moves(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _first(x: Tensor, dim: int | None, count: int) -> Tensor:
    """With the mapped axis first."""
    return x.movedim(dim, 0) if dim is not None else x.unsqueeze(0).expand(count, *x.shape)
