"""The implicit gradient: a linear solve at the fixed point."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import transforms
from ..errors import MapError, OptionError
from ..solvers import Outcome, Solver
from ..solvers.anderson import Anderson
from ..solvers.base import is_number
from ..solvers.linear import LinearSolver
from ..types import AdjointReport, Status
from .base import Adjoint
from .by_parts import solve_by_parts
from .capture import announce, close, substituted
from .equation import Call, Equation
from .graft import Tape, graft
from .held import Held
from .linear import LinearSettings, Products, in_units, named, solve_linear, spread, units_of
from .maps import Primal
from .operator import Method, apply, pull_back

__all__ = ["Implicit"]

_CHANGED = (
    "f is not what it was in the forward pass: it uses other tensors or gives other values. Let it stay the "
    "same until the last backward pass; what changes belongs into the context."
)
_KEPT = 16  # shapes a warm start remembers a solution of; batches may come in any number of lengths
_ABSOLUTE = 1e-3  # the loosest tolerance that is taken over from a forward solve with an absolute one
_DEFAULT = Anderson(start=1)  # acceleration pays from the start where the map is linear


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Implicit gradient: solves ``u = J^T u + g`` for each row, then pulls u back through ``f``.

    Exact up to the tolerance (equation 8 of Habiba & Pearlmutter 2021; equation 5 of Mathur & Plis
    2023; the implicit function theorem). Memory: one evaluation of ``f``. Rows leave the backward
    solve as they leave the forward one. A row whose backward solve fails gets ``u = g``, the
    one-step gradient, and its status says so.

    Closed under differentiation: derivatives of any order, forward mode (``v = J v + r``) and the
    transforms of ``torch.func`` are fixed points too, solved for in the same way.

    Args:
        solver: of the linear equation: the name of a linear solver (``"gcr"``, ``"gmres"``, ``"bicgstab"``,
            ``"neumann"``, ``"auto"``) or of a solver (``"anderson"``, ``"picard"``, ...), or an instance;
            ``None``: ``tw.solver("anderson", start=1)``, which is a truncated Krylov method on a linear map.
        tol: tolerance relative to ``||g||``, row by row; ``None``: that of the forward solve, 1e-3 at most
            where that is absolute. Of a state of several parts each part of the solution meets it, too,
            relative to itself.
        max_iter: products with the Jacobian per row; ``None``: as many as the forward solve had, but
            at least 20. Of a state of several parts: in each of the attempts, of which small parts may take
            three more.
        warm_start: start from the last backward solve of this instance with the same shape (one is kept for
            each of the newest 16), in rows where that is nearer. It pays where the same samples come again
            in the same order, and costs one product where they do not. First derivatives only.
    """

    solver: str | Solver | LinearSolver | None = None
    tol: float | None = None
    max_iter: int | None = None
    warm_start: bool = False
    _last: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    exact: ClassVar[bool] = True
    name: ClassVar[str] = "implicit"
    joint: ClassVar[bool] = False
    default_solver: ClassVar[str | Solver] = _DEFAULT

    def __post_init__(self) -> None:
        if self.tol is not None and not (is_number(self.tol) and 0 < self.tol < math.inf):
            raise OptionError(
                f"Option tol of adjoint {self.name!r} must be a positive number; got {self.tol!r}."
            )
        if not isinstance(self.warm_start, bool):
            raise OptionError(
                f"Option warm_start of adjoint {self.name!r} must be True or False; got {self.warm_start!r}."
            )
        whole = isinstance(self.max_iter, int) and not isinstance(self.max_iter, bool)
        if self.max_iter is not None and (not whole or self.max_iter < 1):
            raise OptionError(
                f"Option max_iter of adjoint {self.name!r} must be a whole number, at least 1; got "
                f"{self.max_iter!r}."
            )
        if self.solver is not None:
            named(self.solver)

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        if not torch.is_grad_enabled():
            return call.solve()
        with torch.no_grad():
            outcome = call.solve()
        settings, autocast = self._settings(call), _autocast_state(call.z0.device.type)

        def pull(tape: Tape, g: Tensor, rows: Tensor | None) -> Tensor:
            with autocast():
                return self._solve(call, settings, outcome.value, tape, g, rows, reports)

        def again(tape: Tape, g: Tensor, z: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
            method = self._method(call, settings, reports)
            return _differentiable(call, method, autocast, tape, g, z, inputs)

        grafted = graft(call, outcome, pull, again)
        if grafted.value.requires_grad:
            call.f = Held(call.f)  # the backward pass evaluates it again
        return grafted

    def run_transformed(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        method = self._method(call, self._settings(call), reports)
        call.f = Held(call.f)
        context = tuple(substituted(c) for c in call.context)
        closed = close(call.equation().map, (call.z0, *context), every=True)
        captured = tuple(substituted(c) for c in closed.captured)
        per_row = (True,) * len(context) + (False,) * len(captured)
        autocast = _autocast_state(call.z0.device.type)
        h = Primal(closed, per_row, bool(context), call.control.coupled, autocast)
        outcome = Outcome(*apply(h, method, call.z0, *context, *captured))
        call.evaluations += sum(method.evaluations)
        call.plain = method.outcomes[0]
        announce(call.plain.status)  # fix looks at it
        return outcome

    def _settings(self, call: Call) -> LinearSettings:
        solver = named(self.solver if self.solver is not None else self.default_solver)
        max_iter = self.max_iter or max(call.control.max_iter, 20)
        tol = call.control.tol
        if call.control.stop == "abs":  # a length in the units of the state is no share of a gradient
            tol = min(tol, _ABSOLUTE)
        return LinearSettings(solver, self.tol or tol, max_iter, call.control.coupled)

    def _method(self, call: Call, settings: LinearSettings, reports: list[AdjointReport]) -> Method:
        return Method(
            call.solver,
            call.control,
            settings,
            self.joint,
            self.name,
            call.rounding(),
            call.layout.sizes,
            reports,
        )

    def _solve(
        self,
        call: Call,
        settings: LinearSettings,
        z: Tensor,
        tape: Tape,
        g: Tensor,
        rows: Tensor | None,
        reports: list[AdjointReport],
    ) -> Tensor:
        units = units_of(z if rows is None else z[rows], call.layout.sizes)
        if units is not None:
            g = units * g
        product = in_units(tape.pull, units)

        def make() -> Products:
            present = torch.arange(z.shape[0], device=z.device) if rows is None else rows
            places = present if rows is None else torch.arange(rows.numel(), device=z.device)
            kept = units

            def renew(keep: Tensor) -> Callable[[Tensor], Tensor]:
                nonlocal present, places, kept
                present, places, kept = present[keep], places[keep], None if kept is None else kept[keep]
                return in_units(tape.of_rows(places, present), kept)

            return Products(product, g, call.rounding(), renew if call.context else None)

        live, evaluations = _live(call, rows), 0
        if live is None:
            parts = call.layout.sizes if units is not None else (g.shape[1],)
            solved, evaluations = solve_by_parts(make, settings, parts, self._guess(g))
        elif live.numel() == 0:
            solved = _nothing_to_solve(g)
        else:  # rows that do not depend on z have u = g
            problem = make()
            problem.keep(live)
            solved = _nothing_to_solve(g)
            solved = spread(
                solve_linear(problem, settings),
                live,
                (solved.value, solved.status, solved.steps, solved.residual),
            )
            evaluations = problem.evaluations
        if self.warm_start:
            self._keep((*g.shape, g.dtype, g.device), solved.value.clone())  # it may be g, the caller's
        reports.append(AdjointReport(self.name, True, *_whole(solved, rows, call), evaluations=evaluations))
        return solved.value if units is None else solved.value / units

    def _keep(self, key: tuple[Any, ...], value: Tensor) -> None:
        self._last.pop(key, None)  # the newest is last
        self._last[key] = value
        while len(self._last) > _KEPT:
            self._last.pop(next(iter(self._last)), None)

    def _guess(self, g: Tensor) -> Tensor | None:
        return self._last.get((*g.shape, g.dtype, g.device)) if self.warm_start else None


def _differentiable(
    call: Call,
    method: Method,
    autocast: Callable[[], Any],
    tape: Tape,
    g: Tensor,
    z: Tensor,
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of a tape's inputs as functions of them and of the solution z."""
    tape.equation.f = call.f
    closed = close(tape.equation.map, (z, *tape.equation.context), every=False)
    if not transforms.active() and not tape.gives(closed.value):
        raise MapError(_CHANGED)
    count = len(tape.equation.context)
    # By place, not by identity: one tensor may be context twice.
    place = {id(tensor): i for i, tensor in enumerate(tape.inputs) if i >= count}
    found = {id(tensor) for tensor in closed.captured}
    lost = not transforms.active() and any(t.requires_grad and id(t) not in found for t in tape.found)
    if lost or not found <= place.keys():
        raise MapError(_CHANGED)
    places = [*range(count), *(place[id(tensor)] for tensor in closed.captured)]
    arguments = [inputs[i] for i in places]
    per_row = (True,) * count + (False,) * len(closed.captured)
    h = Primal(closed, per_row, bool(call.context), call.control.coupled, autocast)
    wanted = [i for i, x in enumerate(arguments) if x.requires_grad]
    status = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)  # broken rows are not here
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip(wanted, pull_back(h, method, z, status, arguments, wanted, g), strict=True):
        grads[places[i]] = grad
    return grads


def _live(call: Call, rows: Tensor | None) -> Tensor | None:
    """Indices of the rows that depend on z, where leaving the others out pays; None: take all."""
    if call.settled is None or not call.context:
        return None
    settled = call.settled if rows is None else call.settled[rows]
    live = torch.nonzero(~settled).flatten()
    return live if live.numel() < Equation.leave_share * settled.numel() else None


def _nothing_to_solve(g: Tensor) -> Outcome:
    status = torch.full((g.shape[0],), int(Status.converged), device=g.device)
    return Outcome(g, status, torch.zeros_like(status), torch.zeros_like(g[:, 0]))


def _whole(solved: Outcome, rows: Tensor | None, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Status, steps and residual over the whole batch; rows kept out are non-finite."""
    if rows is None:
        return solved.status, solved.steps, solved.residual
    batch = call.z0.shape[0]
    status = solved.status.new_full((batch,), int(Status.non_finite)).index_copy(0, rows, solved.status)
    steps = solved.steps.new_zeros(batch).index_copy(0, rows, solved.steps)
    residual = solved.residual.new_full((batch,), float("nan")).index_copy(0, rows, solved.residual)
    return status, steps, residual


def _autocast_state(device: str) -> Callable[[], Any]:
    """The present autocast setting, to be entered again in the backward pass: off, too, if it was off."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=on)
