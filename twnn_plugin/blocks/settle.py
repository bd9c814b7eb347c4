"""The solve of one or several wormholes whose spans overlap: one equation over the union of their calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..adjoints.base import Adjoint
from ..adjoints.held import Reaching
from ..adjoints.implicit import Implicit
from ..adjoints.one_step import OneStep
from ..adjoints.phantom import Phantom
from ..errors import TransformError
from ..fixed_point import run
from ..gates import watch_closed_difficulty, watch_difficulty
from ..solvers.hosting import Alike
from ..types import Solution, Status
from .anchor import anchored
from .choice import Part, Pending
from .one_map import Frozen
from .record import SpanRecord, per_row
from .settings import SolveSettings

__all__ = ["GroupReplay", "at_rest", "note_shapes", "settle", "settle_and_send"]

GroupReplay = Callable[..., tuple[Tensor, ...]]
"""``replay(entry, signals, *constants) -> outs``: the union of the spans applied to rows of inputs.

entry is (b, ...), the input of the union's first call; signals holds for each wormhole what is added to the
first input of its span's first call, (b, ...) or None; outs holds the output of each wormhole's source.
"""


def at_rest(parts: Sequence[Part], outs: Sequence[Tensor]) -> bool:
    """Whether no row of a group opens in eval mode, told in few operations; its records say so then.

    What most of a closed wormhole's cost is. True: the open-loop outputs are the settled ones. False: it
    takes :func:`settle` to tell.

    Args:
        parts: the wormholes.
        outs: (B, ...) for each, the open-loop output of its source.
    """
    companion = parts[0].companion
    if companion is not None and companion.wanted:
        return False
    found = []
    for part, out in zip(parts, outs, strict=True):
        probability = part.glance(out)
        if probability is None:
            return False
        found.append(probability)
    group = None
    for part, probability in zip(parts, found, strict=True):
        part.rested(probability, group)
        group = group or parts[0].span
    if companion is not None:
        for part, out in zip(parts, outs, strict=True):
            companion.settled[part.span] = out.shape[0], None
    return True


def settle(
    parts: Sequence[Part],
    entries: Sequence[Tensor],
    outs: Sequence[Tensor],
    replay: GroupReplay,
    constants: Sequence[Tensor] = (),
    frozen: Frozen | None = None,
    entry: Tensor | None = None,
    settings: SolveSettings | None = None,
) -> tuple[Tensor, ...]:
    """The settled outputs of wormholes that are solved together.

    The state is one tensor per wormhole, the output of its source, so that the fixed point is that of solves
    nested in one another, at one replay of the union per step. A row takes part if any of its wormholes is
    open; closed ones send nothing. The settings are those of the first wormhole.

    Args:
        parts: the wormholes.
        entries: (B, ...) for each, the open-loop input of its target.
        outs: (B, ...) for each, the open-loop output of its source.
        replay: see :data:`GroupReplay`.
        constants: further (B, ...) inputs of the union, gathered with the rows.
        frozen: holds batch statistics and draws fixed; None if there are none.
        entry: (B, ...) the input of the union's first call; None: ``entries[0]``.
        settings: how it is solved; None: as the first wormhole says.

    Returns:
        One tensor like each of ``outs``. Rows whose solve failed keep their open-loop value in eval mode. In
        training, rows that ran out of iterations keep their last iterate, with the gradient of one step from
        there where the adjoint is only right at a solution; rows that became NaN or infinite keep the
        open-loop value and its gradient.
    """
    given, companion = entries[0] if entry is None else entry, parts[0].companion
    if companion is None or not companion.wanted:
        return _Solve(parts, entries, outs, replay, tuple(constants), frozen, given, settings).run()

    def solve(rows: int | None, beside: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        e, o, c = ([t[:rows] for t in tensors] for tensors in (entries, outs, constants))
        made = _Solve(parts, e, o, replay, tuple(c), frozen, given[:rows], settings)
        made.beside = list(beside)
        return made.run(), made.beside

    return companion.doubled(outs, solve)


def settle_and_send(
    parts: Sequence[Part],
    entries: Sequence[Tensor],
    outs: Sequence[Tensor],
    replay: GroupReplay,
    constants: Sequence[Tensor] = (),
    frozen: Frozen | None = None,
    entry: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Tensor]:
    """What :func:`settle` returns, and what one more replay needs to be at the solution.

    Returns:
        The settled outputs; the signals that hold there, with their graph, zero for rows that are not
        settled, or None if no row is; (B,) bool, the rows that are.
    """
    solve = _Solve(
        parts, entries, outs, replay, tuple(constants), frozen, entries[0] if entry is None else entry
    )
    values = solve.run()
    return (values, *solve.sent(values))


class _Solve(Alike, Reaching):
    """One pass of :func:`settle`."""

    def __init__(
        self,
        parts: Sequence[Part],
        entries: Sequence[Tensor],
        outs: Sequence[Tensor],
        replay: GroupReplay,
        constants: tuple[Tensor, ...],
        frozen: Frozen | None,
        entry: Tensor,
        settings: SolveSettings | None = None,
    ):
        _refuse_vmap(parts, outs)
        self.parts, self.outs, self.replay = tuple(parts), tuple(outs), replay
        self.constants, self.frozen = constants, frozen
        self.entry = entry
        self.sizes = [(e.shape[1:], e.dtype) for e in entries]
        self.settings = settings if settings is not None else parts[0].settings
        self.training = parts[0].training and torch.is_grad_enabled()
        self.choices = [part.choose(out) for part, out in zip(parts, outs, strict=True)]
        self.weights: list[Tensor] = []
        self.beside: list[Tensor] | None = None  # the open-loop outputs on their way to a closed head
        # Kept here: the records are those of whichever pass came last.
        self.fallback = torch.zeros_like(self.choices[0].opened)
        note_shapes(parts, entries, outs, constants, entry)
        for part in parts:
            part.pending = None

    def run(self) -> tuple[Tensor, ...]:
        opened = self.choices[0].opened
        for choice in self.choices[1:]:
            opened = opened | choice.opened
        empty = self.entry.shape[0] == 0
        if empty or (not self.training and not bool(opened.any())):
            self._note(opened, None, None)
            return self._anchored(self.outs)
        self.weights = [part.message.weight() for part in self.parts]
        if self.training:
            return self._anchored(self._settle_all(opened))
        return self._settle_opened(opened)

    def reached(self) -> tuple[Any, ...]:
        """What the equation's map uses."""
        return (*self.parts, self.replay)

    def likeness(self) -> Any:
        return self.parts, self.sizes, self.replay, self.frozen

    def _settle_opened(self, opened: Tensor) -> tuple[Tensor, ...]:
        """Solve for the open rows alone and put the settled ones in place."""
        everyone = bool(opened.all())
        rows = torch.nonzero(opened).flatten()
        amounts = [choice.amount for choice in self.choices]
        silent = [not bool(choice.opened.any()) for choice in self.choices]
        given = [self.entry, *amounts, *self.constants]
        context = [rows, *(given if everyone else [c[rows] for c in given])]
        count = len(self.parts)

        def f(state: Any, index: Tensor, entry: Tensor, *rest: Tensor) -> Any:
            signals = tuple(
                None if silent[i] else self._scaled(i, self._message(i, z), amount)
                for i, (z, amount) in enumerate(zip(self._unpack(state), rest[:count], strict=True))
            )
            return self._replay(index, entry, signals, rest[count:])

        starts = self.outs if everyone else [out[rows] for out in self.outs]
        solver, adjoint = self.settings.made
        start = self._start(starts, adjoint)
        solution = run(f, start, tuple(context), self.settings.control, solver, adjoint)
        self._note(opened, solution, rows)
        settled = solution.converged
        values = self._unpack(solution.value)
        if everyone and bool(settled.all()):
            return values
        kept = rows[settled]
        return tuple(o.index_copy(0, kept, v[settled]) for o, v in zip(self.outs, values, strict=True))

    def _settle_all(self, opened: Tensor) -> tuple[Tensor, ...]:
        """Solve with gradients: for every row, closed ones included, where a gate learns from its message.

        Closed rows are at their solution already. In the differentiated evaluation their message
        enters with value zero and the gradient it would have at the gate's probability. Gates that do not
        learn, or from difficulty, have no use for it: then the open rows alone are solved for.
        """
        levers: list[Tensor] = []
        for choice in self.choices:
            levers += choice.levers()
        count = len(self.parts)

        def f(state: Any, index: Tensor, entry: Tensor, *rest: Tensor) -> Any:
            signals = []
            for i, z in enumerate(self._unpack(state)):
                mine, weight, silenced, lever = rest[4 * i : 4 * i + 4]
                z = torch.where(_aligned(mine, z), z, z.detach())  # a closed row does not depend on it
                message = self._message(i, z)
                fixed = message.detach()
                signal = self._scaled(i, message, weight) - self._scaled(i, fixed, silenced)
                signals.append(signal + self._scaled(i, fixed, lever))
            return self._replay(index, entry, tuple(signals), rest[4 * count :])

        # Where no gate learns from its lever, closed rows keep their open-loop value, and its gradient.
        alone = all(map(transforms.constant, levers)) and not bool(opened.all())
        rows = torch.nonzero(opened).flatten() if alone else None
        if rows is not None and not rows.numel():
            self._note(opened, None, None)
            return self._watched(self.outs)
        index = torch.arange(opened.shape[0], device=opened.device)
        given, outs = (index, self.entry, *levers, *self.constants), self.outs
        context = given if rows is None else tuple(c.index_select(0, rows) for c in given)
        if rows is not None:
            outs = tuple(out.index_select(0, rows) for out in outs)
        solver, adjoint = self.settings.made
        start = self._start(outs, adjoint)
        settled = ~opened if rows is None else None
        solution = run(f, start, context, self.settings.control, solver, adjoint, settled=settled)
        values = list(self._unpack(solution.value))
        replaced = self._mend(values, outs, solution, f, context, adjoint.exact)
        self._keep(f, solution, context, opened if rows is None else opened[rows])
        if rows is not None:
            values = [o.index_copy(0, rows, v) for o, v in zip(self.outs, values, strict=True)]
            replaced = torch.zeros_like(opened).index_copy(0, rows, replaced)
        self._note(opened, solution, rows, replaced)
        return self._watched(values)

    def _watched(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The settled outputs, whose gradients teach the gates that learn from difficulty."""
        watched, beside = list(values), self.beside
        for part, choice in zip(self.parts, self.choices, strict=True):
            if choice.margin is None:
                continue
            taught = choice.margin, part.gate.share()
            for i, value in enumerate(watched):
                if beside is None:
                    watched[i] = watch_difficulty(value, *taught)
                else:
                    watched[i], beside[i] = watch_closed_difficulty(value, beside[i], *taught)
        return tuple(watched)

    def _mend(
        self,
        values: list[Tensor],
        outs: Sequence[Tensor],
        solution: Solution,
        f: Callable[..., Any],
        context: tuple[Tensor, ...],
        exact: bool,
    ) -> Tensor:
        """Give failed rows a value and a gradient that mean something; (b,) bool: open-loop rows."""
        status = solution.status
        broken = status == int(Status.non_finite)
        lost = (status == int(Status.max_iter)) | (status == int(Status.diverged))
        if exact and bool(lost.any()):
            # The implicit function theorem holds at solutions only: one step from the last iterate instead.
            rows = torch.nonzero(lost).flatten()
            state = self._pack([v[rows].detach() for v in values])
            stepped = self._unpack(f(state, *(c.index_select(0, rows) for c in context)))
            solution.evaluations += rows.numel()
            for i, (last, step) in enumerate(zip(self._unpack(state), stepped, strict=True)):
                values[i] = values[i].index_copy(0, rows, last + (step - step.detach()))
        if bool(broken.any()):
            for out in outs:  # a row that came in broken stays so
                broken = broken & torch.isfinite(out.detach()).flatten(1).all(dim=1)
            rows = torch.nonzero(broken).flatten()
            for i, out in enumerate(outs):
                values[i] = values[i].index_copy(0, rows, out[rows])
        return broken

    def _keep(
        self, f: Callable[..., Any], solution: Solution, context: tuple[Tensor, ...], opened: Tensor
    ) -> None:
        """Keep the solved map for the penalties that look at it, if there are any."""
        first = self.parts[0]
        if first.aids.jacobian:
            state = self._pack([v.detach() for v in self._unpack(solution.value)])
            rows = opened & (solution.status != int(Status.non_finite))
            first.pending = Pending.now(f, state, context, rows)

    def sent(self, values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...] | None, Tensor]:
        """What each message adds at the settled outputs, and (B,) bool: to which rows."""
        rows = torch.zeros_like(self.fallback)
        for choice in self.choices:
            rows = rows | choice.opened
        rows = rows & ~self.fallback
        if not bool(rows.any()):
            return None, rows
        signals = []
        for i, (value, choice) in enumerate(zip(values, self.choices, strict=True)):
            amount = torch.where(_aligned(rows, choice.amount), choice.amount, 0.0)
            signals.append(self._scaled(i, self._message(i, value), amount))
        return tuple(signals), rows

    def _start(self, outs: Sequence[Tensor], adjoint: Adjoint) -> Any:
        """Where the solve begins: at the open-loop outputs.

        A gradient that is zero at a solution need not be carried back through the open-loop pass. Through the
        steps of a solve it must be: one that begins at its solution, as the second one of a layer does, takes
        a single step, and what the solution owes to the entry is in its start.
        """
        constant = isinstance(adjoint, (Implicit, OneStep, Phantom))
        return self._pack([out.detach() if constant else out for out in outs])

    # The state is a tensor for one wormhole and a tuple for several.
    def _pack(self, values: Sequence[Tensor]) -> Any:
        return values[0] if len(self.parts) == 1 else tuple(values)

    def _unpack(self, state: Any) -> tuple[Tensor, ...]:
        return (state,) if len(self.parts) == 1 else state

    def _message(self, i: int, z: Tensor) -> Tensor:
        size = torch.Size((z.shape[0], *self.sizes[i][0]))
        return self.parts[i].message(z, size, self.weights[i])

    def _scaled(self, i: int, value: Tensor, amount: Tensor) -> Tensor:
        return self.parts[i].message.scaled(value, amount).to(self.sizes[i][1])

    def _replay(
        self, index: Tensor, entry: Tensor, signals: tuple[Tensor | None, ...], constants: Sequence[Tensor]
    ) -> Any:
        with _held(self.frozen, index):
            return self._pack(self.replay(entry, signals, *constants))

    def _anchored(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """In training, let every parameter get a gradient, if only of zeros, whatever the gates do."""
        if not self.training:
            return values
        parameters = [p for part in self.parts for p in part.parameters()]
        return tuple(anchored(value, parameters) for value in values)

    def _note(
        self, opened: Tensor, solution: Solution | None, rows: Tensor | None, replaced: Tensor | None = None
    ) -> None:
        batch, device = opened.shape[0], opened.device
        status = torch.full((batch,), int(Status.converged), device=device)
        steps, residual = torch.zeros_like(status), torch.zeros(batch, device=device)
        if solution is not None:
            where = torch.arange(batch, device=device) if rows is None else rows
            status[where], steps[where] = solution.status, solution.steps
            residual[where] = solution.residual.to(residual.dtype)
            if transforms.active():  # where closed rows, which rest, are looked at once like all others
                steps = torch.where(opened, steps, 0)
        fallback = status != int(Status.converged)
        if self.training:
            fallback = torch.zeros_like(fallback) if replaced is None else replaced
        self.fallback = fallback
        for place, (part, choice) in enumerate(zip(self.parts, self.choices, strict=True)):
            first = place == 0
            record = part.last = SpanRecord(
                part.span,
                per_row(choice.amount.detach()),
                per_row(choice.probability.detach()),
                status,
                steps,
                residual,
                fallback,
                solution.evaluations if solution is not None and first else 0,
                reports=solution.reports if solution is not None else [],
                group=None if first else self.parts[0].span,
                mode=part.mode,
                solved=status.new_zeros(0) if solution is None else rows,
            )
            if part.companion is not None:
                part.companion.note(record)  # part.last may be another thread's by now
            part.solved(self.training)


def note_shapes(
    parts: Sequence[Part],
    entries: Sequence[Tensor],
    outs: Sequence[Tensor],
    constants: Sequence[Tensor],
    entry: Tensor,
) -> None:
    """Note what an evaluation is given, so that its multiply-adds can be counted when somebody asks.

    Args:
        parts: the wormholes.
        entries: as for :func:`settle`.
        outs: so too.
        constants: so too.
        entry: (B, ...) the input of the union's first call.
    """
    made = (c.new_zeros(1, *c.shape[1:]) for c in constants)
    probes = [plain for probe in made if (plain := transforms.value_of(probe)) is not None]
    if len(probes) < len(constants):  # under vmap there is no record, either
        return
    for part, e, out in zip(parts, entries, outs, strict=True):
        part.shapes = (e.shape[1:], out.shape[1:], probes, entry.shape[1:])


def _refuse_vmap(parts: Sequence[Part], outs: Sequence[Tensor]) -> None:
    if any(map(transforms.many, outs)):
        raise TransformError(
            f"torch.vmap cannot map over wormhole {parts[0].span!r}: which rows are iterated, and how often, "
            "depends on their values. tw.unrolled(model.eval(), steps) has a fixed number of steps and can "
            "be mapped; samples that are only many need no vmap, but one batch."
        )


def _aligned(rows: Tensor, value: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (value.dim() - 1))


def _held(frozen: Frozen | None, index: Tensor) -> AbstractContextManager[None]:
    if frozen is None:
        return nullcontext()
    return frozen.replay(None if index.numel() == frozen.batch else index)
