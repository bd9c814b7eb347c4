"""One active batch for the solves of many passes: rows join when there is room and leave when done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.book_rows import fits
from .active_rows import ActiveRows
from .device_rows import DeviceRows
from .host_rows import HostRows
from .kernel_rows import KernelRows
from .methods import Cohorts, Method, Renewing
from .request import Done, Request
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
        self._equation, self._like = first.equation, _spec(first)
        self._waiting: deque[Request] = deque()
        self._places: list[tuple[Request, int] | None] = []  # whose row it is; None: done and delivered
        self._context = tuple(c[:0] for c in first.equation.context)
        at_hand = first.z.device.type == "cpu"  # looks at numbers cost little
        every = self.control.check_every or (1 if at_hand else _EVERY)
        solver = self.solver
        self._rows: ActiveRows
        with self.modes.entered():
            compiled = every == 1 and fits(first.z, self.control)
        if compiled:
            self._rows, solver = KernelRows(first.z, self.control), solver.compiled()
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
        self._equation = request.equation  # the newest, so that no old pass is kept alive

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return sum(request.z.shape[0] - request.entered for request in self._waiting)

    @property
    def oldest(self) -> int:
        """The number of the oldest pass that has rows here."""
        here = [place[0].number for place in self._places if place is not None]
        return min([*here, *(request.number for request in self._waiting)])

    def advance(self) -> tuple[list[Request], list[int]]:
        """Evaluate the active batch, up to the next look at it.

        Returns:
            The requests that are complete now, and for each evaluation the rows in it that were not done.
        """
        with self.modes.entered():
            self._reseat()
            waited_for = [place is not None for place in self._places]
            done, fill = self._rows.advance(self._evaluate, self._method.following, waited_for)
            self.rows_evaluated += len(fill) * len(self._places)
            return [] if done is None else self._deliver(done), fill

    def _evaluate(self, z: Tensor) -> Tensor:
        return self._equation.map(z, *self._context)

    def _evaluate_part(self, z: Tensor, begin: int) -> Tensor:
        """``f`` for the rows from the place ``begin`` on, within a step."""
        self.rows_evaluated += len(z)
        if len(z) == len(self._places):
            return self._evaluate(z)
        return self._equation.map(z, *(c.narrow(0, begin, len(z)) for c in self._context))

    def _deliver(self, done: Done) -> list[Request]:
        """Hand rows over to their requests; those that are complete."""
        owners: dict[Request, list[int]] = {}  # the position in ``done`` of each of their rows
        for position, i in enumerate(done.places):
            place = self._places[i]
            assert place is not None
            owners.setdefault(place[0], []).append(position)
        rows = [place[1] for place in (self._places[i] for i in done.places) if place is not None]
        value, facts = done.value, done.facts
        if len(owners) > 1:  # one request after the other
            order = [position for positions in owners.values() for position in positions]
            index = self._index(order)
            value, facts = value.index_select(0, index), facts.select(index)
        counts = [len(positions) for positions in owners.values()]
        pieces = zip(owners.items(), value.split(counts), facts.split(counts), strict=True)
        for (request, positions), v, f in pieces:
            request.deliver([rows[position] for position in positions], v, f)
        for i in done.places:
            self._places[i] = None
        self.active -= len(done.places)
        return [request for request in owners if request.missing == 0]

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
        owners, z, context = self._next(len(free))
        places = free[: len(owners)]
        if not places:
            return
        for i, owner in zip(places, owners, strict=True):
            self._places[i] = owner
        self.active += len(owners)
        index = self._index(places)
        self._rows.replace(places, index, z)
        pairs = zip(self._context, context, strict=True)
        self._context = tuple(old.index_copy(0, index, new) for old, new in pairs)
        method.replace(index, self._rows.z)

    def _drop(self) -> None:
        """Take the finished rows out."""
        keep = [i for i, place in enumerate(self._places) if place is not None]
        if len(keep) < len(self._places):
            index = self._index(keep)
            self._rows.keep(keep, index)
            self._context = tuple(c.index_select(0, index) for c in self._context)
            self._places = [self._places[i] for i in keep]
        self._method.keep(keep, self._index)

    def _join(self) -> None:
        """Let waiting rows in after the others."""
        owners, z, context = self._next(self.capacity - len(self._places))
        if not owners:
            return
        self._places += owners
        self.active += len(owners)
        self._rows.extend(z)
        pairs = zip(self._context, context, strict=True)
        self._context = tuple(torch.cat(pair) for pair in pairs)
        self._method.extend(z, self._rows.z)

    def _next(self, free: int) -> tuple[list[tuple[Request, int]], Tensor, list[Tensor]]:
        """The rows that have waited longest, ``free`` at most: whose they are, their states and context."""
        owners: list[tuple[Request, int]] = []
        states: list[Tensor] = []
        contexts: list[list[Tensor]] = []
        while self._waiting and len(owners) < free:
            request = self._waiting[0]
            begin = request.entered
            count = min(request.z.shape[0] - begin, free - len(owners))
            states.append(request.z.narrow(0, begin, count))
            contexts.append([c.narrow(0, begin, count) for c in request.equation.context])
            owners += [(request, row) for row in range(begin, begin + count)]
            request.entered += count
            if request.entered == request.z.shape[0]:
                self._waiting.popleft()
        if not owners:
            return [], self._rows.z[:0], []
        return owners, torch.cat(states), [torch.cat(column) for column in zip(*contexts, strict=True)]

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self._rows.z.device)


def _spec(request: Request) -> tuple[Any, ...]:
    """What rows must have in common to lie in one batch."""
    tensors = (request.z, *request.equation.context)
    return (request.equation.layout, *((t.shape[1:], t.dtype, t.device) for t in tensors))
