"""Attaching a gradient to a state that was solved for without one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels, transforms
from ..errors import ConvergenceWarning, MapError, TransformError
from ..solvers import Outcome
from ..solvers.measure import EPS, kinds, measure, report_residual, threshold
from ..types import Status
from .capture import Capture, announce
from .equation import Call

__all__ = [
    "Again",
    "Pull",
    "Tape",
    "attach",
    "check_rows",
    "graft",
    "hooked",
    "looked_into",
    "of_nobody",
    "refuse",
]


class _Source(torch.autograd.Function):
    """The state as the start of a graph: products with its Jacobian end here, gradients do too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class _Graft(torch.autograd.Function):
    """Value ``z``; gradient: what ``pull`` makes of the incoming one, handed to ``fz``.

    Where the gradient itself is to be differentiated, the graph of ``fz`` does not serve: it starts at a z
    that knows nothing of the parameters. Then ``again`` gives the gradients of ``inputs``, everything that
    ``fz`` depends on, as functions of z and of them. ``z0`` gets a gradient of zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, fz: Tensor, z: Tensor, z0: Tensor | None, pull: Any, again: Any, *inputs: Tensor
    ) -> Tensor:
        ctx.pull, ctx.again = pull, again
        ctx.start = None if z0 is None else (z0.shape, z0.dtype, z0.device)
        value = z.view_as(z)
        ctx.save_for_backward(value, fz, *inputs)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        z0 = None
        if ctx.start is not None and ctx.needs_input_grad[2]:
            shape, dtype, device = ctx.start
            z0 = torch.zeros(shape, dtype=dtype, device=device)
        others = [None] * (len(ctx.needs_input_grad) - 5)
        if not torch.is_grad_enabled() and not transforms.active():
            with looked_into():
                return ctx.pull(g), None, z0, None, None, *others
        value, fz, *inputs = ctx.saved_tensors  # create_graph=True, or is_grads_batched=True
        try:
            with looked_into():
                return None, None, z0, None, None, *ctx.again(g, value, inputs)
        except MapError as error:
            with torch.no_grad():
                u = ctx.pull(g)
            return _Refuse.apply(str(error), u, fz, g), None, z0, None, None, *others


@contextmanager
def looked_into() -> Iterator[None]:
    """Say what to use instead of a kind of batch that no solve can be made in."""
    try:
        yield
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):
            raise
        # torch has no public question for this kind of batch.
        raise TransformError(
            "is_grads_batched=True and vectorize=True batch derivatives in a way that cannot be looked into, "
            "and a solve is. Use torch.func.vjp or jvp with torch.func.vmap, or torch.func.jacrev, jacfwd or "
            "hessian."
        ) from error


class _Refuse(torch.autograd.Function):
    """Identity on ``u`` that cannot be differentiated.

    ``u`` depends on everything that ``fz`` and g depend on. They are inputs here so that any second
    derivative passes through this node and raises, instead of missing that dependence silently.
    """

    @staticmethod
    def forward(ctx: Any, reason: str, u: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        ctx.reason = reason
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"Trying to differentiate twice through fix. {ctx.reason}")


_SLACK = 4.0  # a residual this many times the tolerance is no matter of rounding


def hooked() -> bool:
    """Whether what autograd saves now goes through hooks, such as those of ``torch.utils.checkpoint``."""
    # torch has no public question for it.
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 - torch's stubs leave it out
    return autograd._top_saved_tensors_default_hooks(True) is not None


class Tape:
    """``f`` evaluated once with a graph at given states, for products with its Jacobian.

    Args:
        call: the equation.
        z: (b, D) states.
        rows: (b,) their indices in the batch; None: all of them, in order.
        attached: whether the graph reaches the context (for the last product) or the state alone.

    Attributes:
        found: where it is attached, the tensors requiring a gradient that ``f`` closes over.
    """

    def __init__(self, call: Call, z: Tensor, rows: Tensor | None, attached: bool):
        self.equation, self._call, self._changed = call.equation(rows), call, False
        self._rows, self._hooked = rows, attached and hooked()
        self._again: Tape | None = None
        self.found: tuple[Tensor, ...] = ()
        if not attached:
            self.equation.context = tuple(c.detach() for c in self.equation.context)
        with torch.enable_grad():
            self.z = z.detach().requires_grad_()
            if attached:
                self._evaluate_attached()
            else:
                self.fz = self.equation.evaluate(self.z)
        call.evaluations += self.equation.evaluations

    def _evaluate_attached(self) -> None:
        """With all that ``f`` uses in sight; gradients of the whole end at the state, and are not kept."""
        self.z = _Source.apply(self.z)
        assert isinstance(self.z, Tensor)
        with Capture((self.z, *self.equation.context)) as capture:
            self.fz = self.equation.evaluate(self.z)
        self.found = tuple(capture.found.values())

    def pull(self, u: Tensor) -> Tensor:
        """``J^T u`` for a (b, D) matrix of cotangents."""
        assert isinstance(self.z, Tensor)
        if self._hooked:
            return self._unhooked()(u)
        if not self.fz.requires_grad:  # of these rows f makes nothing that depends on anything
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(
            self.fz, self.z, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def _unhooked(self) -> Callable[[Tensor], Tensor]:
        """:meth:`pull` by an evaluation of its own, made with the first product.

        Where the forward pass runs inside ``torch.utils.checkpoint``, or under other hooks on what is saved,
        this tape has nothing saved: each product would compute the whole checkpointed part once more.
        """
        if self._again is None:
            assert isinstance(self.z, Tensor)
            again = Tape(self._call, self.z.detach(), self._rows, attached=False)
            same = self._agrees(again, None)
            self._hooked, self._again = same, again
        return self._again.pull if self._hooked else self.pull

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything that the value depends on: the context, then what ``f`` closes over."""
        return (*self.equation.context, *self.found)

    def of_rows(self, places: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`pull` for some of the rows, by an evaluation of them alone.

        Where ``f`` gives other values by now than it gave then, by the products of all rows: these are the
        ones of ``f`` as it was.

        Args:
            places: (b,) of the rows in this tape.
            rows: (b,) of the rows in the batch.
        """
        assert isinstance(self.z, Tensor)
        if not self._changed:
            some = Tape(self._call, self.z.detach()[places], rows, attached=False)
            if self._agrees(some, places):
                return some.pull
            self._changed = True
        shape = self.z.shape
        return lambda u: self.pull(u.new_zeros(shape).index_copy(0, places, u))[places]

    def _agrees(self, some: Tape, places: Tensor | None) -> bool:
        """Whether an evaluation of some of the rows is one of the same function."""
        # What f closes over may have been made of leaves, which this graph begins with as well.
        same = some.begins_with(self.inputs) or some.begins_with(list(self.leaves()))
        return same and self.gives(some.fz, places)

    def begins_with(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph begins with no other tensors than these, and the state."""
        known = {id(tensor) for tensor in tensors}
        return all(id(leaf) in known for leaf in self.leaves())

    @torch.no_grad()
    def gives(self, values: Tensor, places: Tensor | None = None) -> bool:
        """Whether (b, D) values are this tape's to rounding, those of some of its rows or of all."""
        mine, values, rounding = self.fz.detach(), values.detach(), self._call.apart()
        if kernels.reads(mine, values) and mine.dtype is values.dtype:
            mine, values = kernels.same(mine, mine), kernels.same(values, values)
            return kernels.moving(mine, values, places=places, rounding=rounding) == 0
        mine = mine if places is None else mine[places]
        apart = torch.linalg.vector_norm(values - mine, dim=1)
        return bool((apart <= rounding * torch.linalg.vector_norm(mine, dim=1)).all())

    def reaches_a_leaf(self) -> bool:
        """Whether the value depends on anything, besides the state, that wants a gradient."""
        return next(self.leaves(), None) is not None

    def leaves(self) -> Iterator[Tensor]:
        """The tensors, besides the state, that the graph begins with and whose gradients are accumulated."""
        assert isinstance(self.z, Tensor)
        if self.fz.requires_grad and self.fz.grad_fn is None:  # f returns what it closes over, as it is
            yield self.fz
        seen, stack = {self.z.grad_fn}, [self.fz.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad" and node.variable is not self.z:  # type: ignore[attr-defined]
                yield node.variable  # type: ignore[attr-defined]
            stack.extend(parent for parent, _ in node.next_functions)


Pull = Callable[[Tape, Tensor, Tensor | None], Tensor]
"""Makes of (tape, g, rows) the cotangent that ``f``'s own backward is given.

g is (b, D); rows are the (b,) indices in the batch, or None for all.
"""

Again = Callable[[Tape, Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor | None]]
"""Makes of (tape, g, z, inputs) the gradients of the tape's inputs, differentiably."""


def refuse(name: str) -> Callable[..., list[Tensor | None]]:
    """The ``again`` of an adjoint whose gradient is an approximation and has no derivative to speak of."""

    def again(*given: Any) -> list[Tensor | None]:
        raise MapError(
            f"Adjoint {name!r} approximates the first derivative and has no second one. Use "
            "adjoint='implicit' or 'unrolled', whose derivatives of any order are right."
        )

    return again


def attach(
    source: Tensor,
    z: Tensor,
    z0: Tensor | None,
    pull: Callable[[Tensor], Tensor],
    again: Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor | None]],
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    """The value ``z`` with the gradient that ``pull`` hands to ``source``.

    Args:
        source: (b, D), with a graph.
        z: (b, D), without one.
        z0: gets a gradient of zeros; ``None``: nothing to give it to.
        pull: of the incoming gradient.
        again: of (g, z, inputs): the gradients of ``inputs`` where they are to be differentiated again.
        inputs: all that ``source`` depends on.
    """
    value = _Graft.apply(source, z, z0, pull, again, *inputs)
    assert isinstance(value, Tensor)
    announce(value)
    return value


@torch.no_grad()
def check_rows(call: Call, outcome: Outcome, z: Tensor, fz: Tensor, rows: Tensor | None) -> Outcome:
    """Look at what an evaluation for the gradient shows for nothing: the residuals in the whole batch.

    A row that converged while others were elsewhere, and is not at rest among all of them as they are now,
    depends on the others. Where all rows were done at once, the solve itself has measured that.

    Args:
        call: the equation.
        outcome: its solution.
        z: (b, D) the states in it that were evaluated.
        fz: (b, D) what ``f`` made of them together.
        rows: (b,) their indices; None: all.
    """
    if not call.rows_left and len(kinds(outcome.steps)) == 1:
        return outcome
    status = outcome.status if rows is None else outcome.status[rows]
    if _at_rest(call, z.detach(), fz.detach(), status):
        return outcome
    control = call.control
    change, size = measure(fz - z, fz, control.norm, control.parts)
    bound = _SLACK * threshold(size, control) + call.apart() * size
    moving = (change > bound) & (status == int(Status.converged))
    if not bool(moving.any()):
        return outcome
    local = torch.nonzero(moving).flatten()
    where = local if rows is None else rows[local]
    shown = ", ".join(map(str, where[:8].tolist())) + (", ..." if where.numel() > 8 else "")
    warnings.warn(
        f"{where.numel()} row(s) [{shown}] converged earlier or later than others, and move again when "
        "evaluated with all of them: the rows of f influence each other (batch statistics?), or f is random. "
        "They are reported as stagnated. Pass coupled=True, or make f one fixed map of each row.",
        ConvergenceWarning,
        stacklevel=2,
    )
    return replace(
        outcome,
        status=outcome.status.index_fill(0, where, int(Status.stagnated)),
        residual=outcome.residual.index_copy(
            0, where, report_residual(change, size, control)[local].to(outcome.residual.dtype)
        ),
    )


def _at_rest(call: Call, z: Tensor, fz: Tensor, status: Tensor) -> bool:
    """Whether compiled kernels see that no converged row moves; where they do not, it is to be looked at."""
    control = call.control
    if control.scale is not None or fz.dtype is not z.dtype or not kernels.reads(z, fz):
        return False
    apart = kernels.moving(
        kernels.same(fz, z),
        kernels.same(z, z),
        status=status,
        meant=int(Status.converged),
        tol=control.tol,
        floor=EPS,
        slack=_SLACK,
        rounding=call.apart(),
        relative=control.stop == "rel",
        largest=control.norm == "max",
        parts=control.parts,
    )
    return apart == 0


def _taped(call: Call, value: Tensor, broken: Tensor | None) -> tuple[Tape, Tensor | None]:
    """``f`` at the rows of a value that are not broken, and their indices; None: all."""
    rows = torch.nonzero(~broken).flatten() if broken is not None and bool(broken.any()) else None
    return Tape(call, value if rows is None else value[rows], rows, attached=True), rows


def of_nobody(call: Call, outcome: Outcome) -> Outcome:
    """The outcome where no row has a gradient: a loss of it still has one, of zeros, for all that ``f`` uses.

    What that is shows where the solve began. An empty batch need be nothing that ``f`` knows how to take.
    """
    tape = Tape(call, call.z0.detach(), None, attached=True)
    value = outcome.value.detach()
    for tensor in (call.z0, *tape.inputs, *tape.leaves()):
        if tensor.requires_grad:
            nothing = tensor[..., None][..., :0].sum()  # zero, and no product with what may be NaN
            value = value + (nothing.real if nothing.is_complex() else nothing).to(value.dtype)
    return replace(outcome, value=value)


def graft(call: Call, outcome: Outcome, pull: Pull, again: Again) -> Outcome:
    """Give the outcome's value a gradient by one evaluation of ``f`` with a graph.

    Rows with non-finite values stay out of that evaluation: through the weights they would make
    every gradient NaN, even that of a loss that ignores them (0 * NaN is NaN).

    Args:
        call: the equation.
        outcome: its solution, without a graph.
        pull: gives the gradient.
        again: gives it where it is to be differentiated again; raises ``MapError`` where it cannot.
    """
    if not torch.is_grad_enabled():
        return outcome
    if outcome.value.shape[1] == 0:  # of nothing, but of what its gradients of zeros belong to
        return replace(outcome, value=call.equation().evaluate(outcome.value))
    found, broken = kinds(outcome.status), None
    if int(Status.non_finite) in found:
        broken = outcome.status == int(Status.non_finite)
    if call.settled is not None:  # rows that nobody solved for, and so nobody looked at
        wrong = ~torch.isfinite(outcome.value).all(dim=1)
        broken = wrong if broken is None else broken | wrong
    if call.control.coupled:  # f is a map of the whole batch: of some rows it is another one
        broken = None
    if outcome.value.shape[0] == 0 or (broken is not None and bool(broken.all())):
        return of_nobody(call, outcome)
    tape, rows = _taped(call, outcome.value, broken)
    if int(Status.diverged) in found and not call.control.coupled:
        over = ~torch.isfinite(tape.fz.detach()).all(dim=1)  # finite themselves, with values that are not
        if bool(over.any()):
            broken = over if rows is None or broken is None else broken.index_copy(0, rows, over)
            if bool(broken.all()):
                return of_nobody(call, outcome)
            tape, rows = _taped(call, outcome.value, broken)
    z = outcome.value if rows is None else outcome.value[rows]
    start = call.z0 if call.z0.requires_grad else None
    assert isinstance(tape.z, Tensor)
    outcome = check_rows(call, outcome, tape.z, tape.fz, rows)
    if not tape.reaches_a_leaf():
        if start is None:
            return outcome
        # The start alone wants a gradient, which is zero: nothing is solved for.
        value = attach(
            tape.fz, z, start, lambda g: g, lambda g, value, inputs: [None] * len(inputs), tape.inputs
        )
        return replace(outcome, value=value if rows is None else outcome.value.index_copy(0, rows, value))
    value = attach(
        tape.fz,
        z,
        start,
        lambda g: pull(tape, g, rows),
        lambda g, value, inputs: again(tape, g, value, inputs),
        tape.inputs,
    )
    if rows is not None:
        value = outcome.value.index_copy(0, rows, value)
    return Outcome(value, outcome.status, outcome.steps, outcome.residual)
