"""One call of ``fix`` as the adjoints see it: the equation, its rows and its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import transforms
from ..errors import MapError
from ..solvers import Control, Outcome, Solver, solve
from ..solvers.precision import TENSOR_FLOAT, cut_short
from ..state import Layout
from ..types import State

__all__ = ["Call", "Equation"]


_IN_PLACE = (
    "f writes to the state that it is given, which the solver goes on to use: by a torch function whose name "
    "ends in an underscore, or a module with inplace=True. Let f make a new tensor, or begin it with "
    "z = z.clone()."
)


_SAME_MEMORY = (
    "f returns the memory that it returned before, with other numbers in it, while the solver still uses the "
    "earlier ones: a buffer for results, as of numpy's out= or of a captured CUDA graph. Let f return a copy "
    "(.clone())."
)


_WRITTEN = (
    "f writes to context {place}, which belongs to the caller and is given to f again: by a torch function "
    "whose name ends in an underscore, or a module with inplace=True. Let f make a new tensor, or begin it "
    "with c = c.clone()."
)


def _capturing(z: Tensor) -> bool:
    return z.is_cuda and torch.cuda.is_current_stream_capturing()


class Equation:
    """``z = f(z, *context)`` for the rows that are still being solved (a ``Problem``).

    Rows may leave only if context was passed: a function without context may close over the
    batch, and then has no way to know which rows are left.
    """

    leave_share = 0.8

    def __init__(self, f: Callable[..., State], layout: Layout, context: Sequence[Tensor], size: int):
        self.f = f
        self.layout = layout
        self.context = tuple(context)
        self.size = size
        self.evaluations = 0
        self.can_leave = bool(context)
        self.alias = False  # whether f returns the same memory at each call, which then is its own
        self._first: Tensor | None = None  # what it returned first, until it was called again

    def map(self, z: Tensor, *context: Tensor) -> Tensor:
        """``f`` as a function of (b, D) states and their context."""
        layout = self.layout
        return layout.pack(self.f(layout.unpack(z), *context), len(z))

    def evaluate(self, z: Tensor) -> Tensor:
        if self.evaluations == 0:
            self.evaluations = len(z)
            self._first = fz = self._evaluate_first(z)
            return fz
        self.evaluations += len(z)
        # Tensors of inference mode do not count how often they are written to.
        version = None if z.is_inference() else z._version
        fz = self.map(z, *self.context)
        if version is not None and z._version != version:
            raise MapError(_IN_PLACE)
        if self._first is not None:
            self._look_at_memory(fz)
        return fz

    def _evaluate_first(self, z: Tensor) -> Tensor:
        """``f(z)``, which must not write to z nor, as far as this shows, to the context."""
        if z.is_inference():
            return self.map(z, *self.context) if _capturing(z) else self._watched(z)
        version = z._version
        before = [None if c.is_inference() else c._version for c in self.context]
        fz = self.map(z, *self.context)
        if z._version != version:
            raise MapError(_IN_PLACE)
        for place, (c, known) in enumerate(zip(self.context, before, strict=True)):
            if known is not None and c._version != known:
                raise MapError(_WRITTEN.format(place=place))
        return fz

    @torch.no_grad()
    def _look_at_memory(self, fz: Tensor) -> None:
        """Refuse an ``f`` that wrote its second result where its first one is, out of torch's sight."""
        first, self._first = self._first, None
        assert first is not None
        if transforms.active() or fz.is_meta:  # what is wrapped has no memory of its own
            return
        self.alias = fz.numel() > 0 and fz.data_ptr() == first.data_ptr()
        if not self.alias or _capturing(fz):
            return
        before = fz.clone()  # a constant of f's own stays what it is
        self.map(before.clone(), *self.context)
        if not torch.equal(fz.nan_to_num(), before.nan_to_num()):
            raise MapError(_SAME_MEMORY)

    def _watched(self, z: Tensor) -> Tensor:
        given = z.clone()
        fz = self.map(z, *self.context)
        if not torch.equal(given.nan_to_num(), z.nan_to_num()):
            raise MapError(_IN_PLACE)
        return fz

    def keep(self, rows: Tensor) -> None:
        self.context = tuple(c.index_select(0, rows) for c in self.context)
        self.size = rows.numel()


class _Embedded(Equation):
    """Some rows of an equation without context: ``f`` may close over the batch, so it sees all of it.

    Args:
        rows: (b,) the indices of the rows that are meant; the states of the others are zero.
        batch: rows in all.
    """

    def __init__(self, f: Callable[..., State], layout: Layout, rows: Tensor, batch: int):
        super().__init__(f, layout, (), rows.numel())
        self.rows = rows
        self.batch = batch

    def map(self, z: Tensor, *context: Tensor) -> Tensor:
        whole = z.new_zeros(self.batch, z.shape[1]).index_copy(0, self.rows, z)
        return super().map(whole)[self.rows]

    def evaluate(self, z: Tensor) -> Tensor:
        self.evaluations += self.batch
        return self.map(z)


_APART = 64.0  # roundings in which the same row may differ between batches


@dataclass
class Call:
    """Everything ``fix`` was given, checked.

    Attributes:
        f: the map, of (state, *context).
        layout: how the state lies in the (B, D) matrix.
        z0: (B, D) the starting state.
        context: tensors with B rows each.
        solver: a solver instance.
        control: when a row is finished.
        settled: (B,) bool of rows for which ``f`` does not depend on the state, and ``z0`` is its value;
            they are not solved for, forward or backward, yet take part in the differentiated
            evaluation. None: no row is.
        evaluations: rows evaluated so far.
        rows_left: whether rows left the batch during the forward solve.
        plain: under a transformation, the outcome on plain tensors: under ``vmap`` it holds the rows of
            all instances, and it can be looked at.
    """

    f: Callable[..., State]
    layout: Layout
    z0: Tensor
    context: tuple[Tensor, ...]
    solver: Solver
    control: Control
    settled: Tensor | None = None
    evaluations: int = 0
    rows_left: bool = False
    plain: Outcome | None = None
    _alias: bool = False

    def equation(self, rows: Tensor | None = None) -> Equation:
        """The equation of all rows, or of some."""
        if rows is not None and not self.context:
            return _Embedded(self.f, self.layout, rows, self.z0.shape[0])
        context = self.context if rows is None else tuple(c.index_select(0, rows) for c in self.context)
        size = self.z0.shape[0] if rows is None else rows.numel()
        return Equation(self.f, self.layout, context, size)

    def rounding(self) -> float:
        """Relative rounding error of an evaluation, in the widest of the dtypes it goes through."""
        eps = self._eps()
        return max(eps, TENSOR_FLOAT) if self._cut_short() else eps

    def apart(self) -> float:
        """How far, relative to its size, a row may lie from the same row in another batch, by rounding."""
        most = _APART * self._eps()
        # Numbers are cut to TensorFloat-32 one by one, alike in whatever batch they are.
        return max(most, 4 * TENSOR_FLOAT) if self._cut_short() else most

    def _eps(self) -> float:
        dtypes, device = [*self.layout.dtypes, self.layout.dtype], self.z0.device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _cut_short(self) -> bool:
        return cut_short(self.z0.device, (*self.layout.dtypes, self.layout.dtype))

    def solve(self) -> Outcome:
        """Solve for every row that is not settled, in the present grad mode."""
        rows = None
        if self.settled is not None and bool(self.settled.any()):
            rows = torch.nonzero(~self.settled).flatten()
        equation = self.equation(rows)
        start = self.z0 if rows is None else self.z0[rows]
        control = self.control if rows is None else _renumbered(self.control, rows)
        outcome = solve(self.solver, equation, start, control)
        self.evaluations += equation.evaluations
        self._alias = equation.alias
        self.rows_left = equation.size < (self.z0.shape[0] if rows is None else rows.numel())
        return self._own(outcome) if rows is None else self._spread(outcome, rows)

    def _own(self, outcome: Outcome) -> Outcome:
        """The outcome in memory that nobody else has: ``f`` may return its context, a solve its start.

        Nor do its rows have one memory among them, as those of a row that ``f`` has expanded.
        """
        if transforms.active() or outcome.value.numel() == 0:
            return outcome
        held = outcome.value.untyped_storage().data_ptr()
        shared = any(t.untyped_storage().data_ptr() == held for t in (self.z0, *self.context))
        if not self._alias and not shared and 0 not in outcome.value.stride():
            return outcome
        return replace(outcome, value=outcome.value.clone())

    def _spread(self, outcome: Outcome, rows: Tensor) -> Outcome:
        batch = self.z0.shape[0]
        return Outcome(
            self.z0.index_copy(0, rows, outcome.value),
            outcome.status.new_zeros(batch).index_copy(0, rows, outcome.status),
            outcome.steps.new_zeros(batch).index_copy(0, rows, outcome.steps),
            outcome.residual.new_zeros(batch).index_copy(0, rows, outcome.residual),
        )


def _renumbered(control: Control, rows: Tensor) -> Control:
    """The stopping rule for some rows, whose callback is told their places in the whole batch."""
    callback = control.callback
    if callback is None:
        return control
    return replace(control, callback=lambda seen: callback(replace(seen, rows=rows[seen.rows])))
