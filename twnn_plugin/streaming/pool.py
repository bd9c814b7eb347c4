"""One active batch for the solves of many passes: rows join when there is room and leave when done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.masked import take
from ..solvers.measure import Threshold
from ..solvers.memory import device_only
from ..trees import leaves, rebuild
from .request import Request, Rows
from .sameness import same

__all__ = ["REFILL", "Pool"]

REFILL = 0.25
"""Share of the places that must be free before rows join: gathering costs a pass over everything."""

_EVERY = 5  # evaluations between two looks on an accelerator, as the driver has it


class _Cohort(NamedTuple):
    """Rows that lie next to each other in the batch and whose solver state is one tree."""

    size: int
    state: Any


class _Slice:
    """The equation of a cohort's rows (a ``Problem``), for methods that evaluate ``f`` in a step."""

    can_leave = False
    leave_share = 0.0

    def __init__(self, pool: Pool, begin: int, size: int):
        self.size, self.evaluations = size, 0
        self._pool, self._begin = pool, begin

    def evaluate(self, z: Tensor) -> Tensor:
        """``f`` for these rows."""
        self.evaluations += self.size
        self._pool.rows_evaluated += self.size
        return self._pool.evaluate(z, self._begin, self.size)

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("rows leave by the pool")


class Pool:
    """The active batch of one equation.

    The function is evaluated for all rows at once. The solver steps cohort by cohort: rows that joined at
    different times are at different stages of a method (Anderson's history fills up, say). As soon as
    the states of two cohorts have the same structure they become one; what is in them is one row a sample, so
    that every row gets what it would get in a batch of its own.

    Args:
        first: the request that it is made for; it still has to be added.
        capacity: rows in the active batch at most.

    Attributes:
        rows_evaluated: rows evaluated in all, those that were done but had not left included.
        peak_cohorts: cohorts at most.
        lonely: whether it has only seen the rows of one pass.
    """

    def __init__(self, first: Request, capacity: int):
        self.capacity = capacity
        self.rows_evaluated = 0
        self.peak_cohorts = 0
        self.lonely = True
        self.solver, self.control, self.modes = first.solver, first.control, first.modes
        self._equation, self._like = first.equation, _spec(first)
        self._threshold = Threshold(first.control, first.z)
        self._waiting: deque[Request] = deque()
        self._places: list[tuple[Request, int] | None] = []  # whose row it is; None: done and delivered
        self._rows = Rows.new(first.z[:0])
        self._context = tuple(c[:0] for c in first.equation.context)
        self._cohorts: list[_Cohort] = []
        self._every = self.control.check_every or (1 if first.z.device.type == "cpu" else _EVERY)

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
    def active(self) -> int:
        """Rows in the active batch that are not done."""
        return sum(place is not None for place in self._places)

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return sum(request.z.shape[0] - request.entered for request in self._waiting)

    @property
    def oldest(self) -> int:
        """The number of the oldest pass that has rows here."""
        here = [place[0].number for place in self._places if place is not None]
        return min([*here, *(request.number for request in self._waiting)])

    def evaluate(self, z: Tensor, begin: int, size: int) -> Tensor:
        """``f`` for ``size`` rows from the place ``begin`` on."""
        whole = size == len(self._places)
        context = self._context if whole else tuple(c.narrow(0, begin, size) for c in self._context)
        return self._equation.map(z, *context)

    def advance(self) -> tuple[list[Request], list[int]]:
        """Evaluate the active batch, up to the next look at it.

        Returns:
            The requests that are complete now, and for each evaluation the rows in it that were not done.
        """
        with self.modes.entered(), nullcontext() if self._every == 1 else device_only():
            self._reseat()
            fill = []
            for _ in range(self._every):
                fill.append(self._rows.alive.sum())
                self._rows = self._step(self._rows)
            self.rows_evaluated += len(fill) * len(self._places)
            seen = torch.cat([torch.stack(fill), self._rows.alive.long()]).tolist()  # the one look
            done = [i for i, alive in enumerate(seen[len(fill) :]) if not alive]
            return self._collect(done), seen[: len(fill)]

    # One evaluation.

    def _step(self, rows: Rows) -> Rows:
        z = rows.z
        fz = self.evaluate(z, 0, len(self._places))
        r = fz - z
        rows, verdict = rows.look(fz, r, self.control, self._threshold)
        if self._every == 1:  # the host looks at every evaluation
            if bool(verdict.goes_on.all()):
                return rows._replace(z=self._following(z, fz, r))
            if not bool(verdict.goes_on.any()):
                return rows._replace(z=verdict.values(z, fz, z))
        return rows._replace(z=verdict.values(z, fz, self._following(z, fz, r)))

    def _following(self, z: Tensor, fz: Tensor, r: Tensor) -> Tensor:
        """The solver's next iterates, cohort by cohort."""
        if len(self._cohorts) == 1:
            problem = _Slice(self, 0, self._cohorts[0].size)
            following, state = self.solver.step(problem, z, fz, r, self._cohorts[0].state)
            self._cohorts = [_Cohort(problem.size, state)]
            return following
        parts, cohorts, begin = [], [], 0
        for size, state in self._cohorts:
            here, there, way = (x.narrow(0, begin, size) for x in (z, fz, r))
            following, state = self.solver.step(_Slice(self, begin, size), here, there, way, state)
            parts.append(following)
            cohorts.append(_Cohort(size, state))
            begin += size
        self._cohorts = cohorts
        return torch.cat(parts)

    def _collect(self, done: Sequence[int]) -> list[Request]:
        """Deliver the rows at these places, where that has not happened; the requests that are complete."""
        owners: dict[Request, list[tuple[int, int]]] = {}
        for i in done:
            place = self._places[i]
            if place is not None:
                owners.setdefault(place[0], []).append((i, place[1]))
                self._places[i] = None
        if not owners:
            return []
        index = self._index([i for pairs in owners.values() for i, _ in pairs])
        value, facts = self._rows.z.index_select(0, index), self._rows.facts(index, self.control)
        counts = [len(pairs) for pairs in owners.values()]
        for (request, pairs), v, s in zip(
            owners.items(), value.split(counts), facts.split(counts), strict=True
        ):
            request.deliver([row for _, row in pairs], v, s)
        return [request for request in owners if request.missing == 0]

    # Who is in the batch.

    def _reseat(self) -> None:
        """Give the free places to rows that wait, or shrink, if it is worth a pass over everything."""
        active, waiting = self.active, self.waiting
        if active and waiting:
            if self.capacity - active < min(max(1.0, REFILL * self.capacity), waiting):
                return
        elif active and active >= Equation.leave_share * len(self._places):
            return
        self._drop()
        self._join()
        self.peak_cohorts = max(self.peak_cohorts, len(self._cohorts))

    def _drop(self) -> None:
        """Take the finished rows out, and make neighbours one that have come to look alike."""
        keep = [place is not None for place in self._places]
        cohorts: list[_Cohort] = []
        begin = 0
        for size, state in self._cohorts:
            local = [i for i in range(size) if keep[begin + i]]
            begin += size
            if not local:
                continue
            if len(local) < size:
                state = take(state, self._index(local))
            if cohorts and _alike(cohorts[-1].state, state):
                last = cohorts.pop()
                cohorts.append(_Cohort(last.size + len(local), _joined(last.state, state)))
            else:
                cohorts.append(_Cohort(len(local), state))
        self._cohorts = cohorts
        if not all(keep):
            index = self._index([i for i, kept in enumerate(keep) if kept])
            self._rows = take(self._rows, index)
            self._context = tuple(c.index_select(0, index) for c in self._context)
            self._places = [place for place in self._places if place is not None]

    def _join(self) -> None:
        """Let waiting rows in, the longest waiting first."""
        states, contexts = [], []
        free = self.capacity - len(self._places)
        new = 0
        while self._waiting and new < free:
            request = self._waiting[0]
            begin, count = request.entered, min(request.z.shape[0] - request.entered, free - new)
            states.append(request.z.narrow(0, begin, count))
            contexts.append([c.narrow(0, begin, count) for c in request.equation.context])
            self._places += [(request, row) for row in range(begin, begin + count)]
            request.entered += count
            new += count
            if request.entered == request.z.shape[0]:
                self._waiting.popleft()
        if not new:
            return
        z = torch.cat(states)
        self._rows = _joined(self._rows, Rows.new(z))
        columns = zip(*contexts, strict=True)
        self._context = tuple(torch.cat([old, *c]) for old, c in zip(self._context, columns, strict=True))
        state = self.solver.init(z)
        if self._cohorts and _alike(self._cohorts[-1].state, state):
            last = self._cohorts.pop()
            self._cohorts.append(_Cohort(last.size + new, _joined(last.state, state)))
        else:
            self._cohorts.append(_Cohort(new, state))

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self._rows.z.device)


def _spec(request: Request) -> tuple[Any, ...]:
    """What rows must have in common to lie in one batch."""
    tensors = (request.z, *request.equation.context)
    return (request.equation.layout, *((t.shape[1:], t.dtype, t.device) for t in tensors))


def _alike(a: Any, b: Any) -> bool:
    """Whether two solver states differ in their rows alone."""
    if _bare(a) != _bare(b):
        return False
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if isinstance(x, Tensor):
            if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
                return False
        elif x is not y and not bool(x == y):
            return False
    return True


def _bare(state: Any) -> Any:
    """The nesting of a state and the types of its leaves."""
    return rebuild(state, type)


def _joined(a: Any, b: Any) -> Any:
    """Two trees that are alike, their rows one after the other."""
    others = leaves(b)

    def join(leaf: Any) -> Any:
        other = next(others)
        return torch.cat([leaf, other]) if isinstance(leaf, Tensor) else leaf

    return rebuild(a, join)
