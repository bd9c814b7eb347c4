"""One active batch for the solves of many passes: rows join when there is room and leave when done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.base import check_place
from ..solvers.book_rows import fits
from .active_rows import ActiveRows
from .device_rows import DeviceRows
from .host_rows import HostRows
from .kernel_rows import KernelRows
from .methods import Cohorts, Method, Renewing
from .request import Owner, Request
from .sameness import same

__all__ = ["Pool"]

_EVERY = 5  # evaluations between two looks on an accelerator, as the driver has it


class Pool:
    """The active batch of one equation.

    The function is evaluated for all rows at once. What is in the solver's state is one row a sample, so that
    every row gets what it would get in a batch of its own; rows of different ages are stepped as
    :mod:`twnn_plugin.streaming.methods` says.

    Args:
        first: the request that it is made for; it still has to be added.
        capacity: rows in the active batch at most.

    Attributes:
        rows_evaluated: rows evaluated in all, those that were done but had not left included.
        active: rows in the active batch that are not done.
        lonely: whether it has only seen the rows of one pass.
    """

    def __init__(self, first: Request, capacity: int):
        self.capacity = capacity
        self.rows_evaluated = self.active = 0
        self.lonely = True
        self.solver, self.control, self.modes = first.solver, first.control, first.modes
        self._like = _spec(first)
        self._waiting: deque[Request] = deque()
        self._places: list[Owner | None] = []  # whose row it is; None: done and delivered
        # Of the rows that are here. Its first evaluations show whether f writes where it must not.
        given = first.equation
        self._equation = Equation(given.f, given.layout, [c[:0] for c in given.context], 0)
        at_hand = first.z.device.type == "cpu"  # looks at numbers cost little
        every = self.control.check_every or (1 if at_hand else _EVERY)
        solver = self.solver
        self._rows: ActiveRows
        with self.modes.entered():
            compiled = every == 1 and fits(first.z, self.control)
        if compiled:
            self._rows, solver = KernelRows(first.z, self.control, capacity), solver.compiled()
        elif at_hand and every == 1:
            self._rows = HostRows(first.z, self.control)
        else:
            self._rows = DeviceRows(first.z, self.control, every)
        kind = Renewing if solver.renews else Cohorts
        self._method: Method = kind(solver, self._evaluate_part)

    def accepts(self, request: Request) -> bool:
        """Whether the request's rows may share a batch with those here."""
        return (
            (request.solver is self.solver or request.solver == self.solver)
            and request.control == self.control
            and request.modes == self.modes
            and _spec(request) == self._like
            and same(self._equation.f, request.equation.f)
        )

    def add(self, request: Request) -> None:
        """Let a request's rows wait for places."""
        self._waiting.append(request)
        self._equation.f = request.equation.f  # the newest, so that no old pass is kept alive

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return sum(request.z.shape[0] - request.entered for request in self._waiting)

    @property
    def oldest(self) -> int:
        """The number of the oldest pass that has rows here."""
        here = [place[0].number for place in self._places if place is not None]
        return min([*here, *(request.number for request in self._waiting)])

    def advance(self, fill: list[int], until_any: bool) -> list[Request]:
        """Evaluate the active batch until a request is complete.

        Args:
            fill: gets, for each evaluation, the rows in it that were not done.
            until_any: whether to come back with the first rows that are done, since another pool, or another
                pass, might go first then; else as long as none is complete.

        Returns:
            The requests that are complete now.
        """
        with self.modes.entered():
            while True:
                self._reseat()
                places, some = self._rows.advance(
                    self._evaluate, self._method.following, self._places, self.active
                )
                self.rows_evaluated += len(some) * len(self._places)
                fill += some
                complete = self._deliver(places)
                if complete or (places and until_any):
                    return complete

    def _evaluate(self, z: Tensor) -> Tensor:
        first = self._equation.evaluations == 0
        fz = self._equation.evaluate(z)
        if first:
            check_place(fz, z)
        return fz

    def _evaluate_part(self, z: Tensor, begin: int) -> Tensor:
        """``f`` for the rows from the place ``begin`` on, within a step."""
        self.rows_evaluated += len(z)
        if len(z) == len(self._places):
            return self._evaluate(z)
        return self._equation.map(z, *(c.narrow(0, begin, len(z)) for c in self._equation.context))

    def _deliver(self, places: list[int]) -> list[Request]:
        """Nobody waits any more for the rows in these places; the requests that are complete."""
        complete = []
        for place in places:
            owner = self._places[place]
            assert owner is not None
            request, self._places[place] = owner[0], None
            request.missing -= 1
            if not request.missing:
                complete.append(request)
        self.active -= len(places)
        for request in complete:
            request.outcome = outcome = self._rows.outcome(request)
            request.equation.evaluations += int(outcome.steps.sum())
        return complete

    # Who is in the batch.

    def _reseat(self) -> None:
        """Give the free places to rows that wait, or shrink, if it is worth a pass over everything."""
        active, waiting = self.active, self.waiting
        if active and waiting:
            if self.capacity - active < min(max(1.0, self._method.refill * self.capacity), waiting):
                return
        elif active and active >= Equation.leave_share * len(self._places):
            return
        if active and waiting and isinstance(self._method, Renewing):
            self._replace(self._method)
        else:
            self._drop()
        self._join()

    def _replace(self, method: Renewing) -> None:
        """Let waiting rows take the places of finished ones."""
        free = [i for i, place in enumerate(self._places) if place is None]
        if not free:
            return
        owners, z, context = self._next(len(free))
        places = free[: len(owners)]
        for i, owner in zip(places, owners, strict=True):
            self._places[i] = owner
        self.active += len(owners)
        index = self._index(places)
        self._rows.replace(places, index, z, owners)
        pairs = zip(self._equation.context, context, strict=True)
        self._equation.context = tuple(old.index_copy(0, index, new) for old, new in pairs)
        method.replace(index, self._rows.z)

    def _drop(self) -> None:
        """Take the finished rows out."""
        keep = [i for i, place in enumerate(self._places) if place is not None]
        if len(keep) < len(self._places):
            index = self._index(keep)
            self._rows.keep(keep, index)
            self._equation.keep(index)
            self._places = [self._places[i] for i in keep]
        self._method.keep(keep, self._index)

    def _join(self) -> None:
        """Let waiting rows in after the others."""
        free = self.capacity - len(self._places)
        if not free or not self._waiting:
            return
        owners, z, context = self._next(free)
        self._places += owners
        self.active += len(owners)
        self._rows.extend(z, owners)
        pairs = zip(self._equation.context, context, strict=True)
        self._equation.context = tuple(torch.cat(pair) for pair in pairs)
        self._equation.size = len(self._places)
        self._method.extend(z, self._rows.z)

    def _next(self, free: int) -> tuple[list[Owner], Tensor, list[Tensor]]:
        """The rows that have waited longest, ``free`` at most: whose they are, their states and context."""
        owners: list[Owner] = []
        columns: list[list[Tensor]] = [[] for _ in range(1 + len(self._equation.context))]
        while self._waiting and len(owners) < free:
            request = self._waiting[0]
            begin, size = request.entered, request.z.shape[0]
            count = min(size - begin, free - len(owners))
            for column, whole in zip(columns, (request.z, *request.equation.context), strict=True):
                column.append(whole if count == size else whole.narrow(0, begin, count))
            owners += [(request, row) for row in range(begin, begin + count)]
            request.entered += count
            if request.entered == size:
                self._waiting.popleft()
        z, *context = (column[0] if len(column) == 1 else torch.cat(column) for column in columns)
        return owners, z, context

    def _index(self, places: Sequence[int]) -> Tensor:
        # Not made on the device, which would be waited for.
        index = torch.tensor(places, dtype=torch.long, device="cpu")
        return index.to(self._rows.z.device, non_blocking=True)


def _spec(request: Request) -> tuple[Any, ...]:
    """What rows must have in common to lie in one batch."""
    tensors = (request.z, *request.equation.context)
    return (request.equation.layout, *((t.shape[1:], t.dtype, t.device) for t in tensors))
