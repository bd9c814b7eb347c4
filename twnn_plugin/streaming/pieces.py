"""What becomes of the rows of a batch, piece by piece, by operations of torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers.base import Control, Outcome
from ..solvers.measure import classify, report_residual
from ..types import Status
from .active_rows import ActiveRows, Evaluate, Following
from .request import Owner, Request

__all__ = ["Done", "Facts", "Pieces", "ending"]


class Facts(NamedTuple):
    """What is known of n rows that are done."""

    measured: Tensor  # (3, n) change, size and bound, last measured
    steps: Tensor  # (n,) evaluations
    stalled: Tensor  # (n,) bool: done by stagnation, or by diverging
    spent: Tensor  # (n,) bool: ran out of evaluations

    def split(self, sizes: list[int]) -> list[Facts]:
        """In pieces of these sizes."""
        if len(sizes) == 1:
            return [self]
        columns = (column.split(sizes, dim=-1) for column in self)
        return [Facts(*piece) for piece in zip(*columns, strict=True)]

    def select(self, index: Tensor) -> Facts:
        """Of some of them, in this order."""
        return Facts(*(column.index_select(-1, index) for column in self))

    @staticmethod
    def joined(pieces: Sequence[Facts], order: Tensor) -> Facts:
        """Those of all pieces, in an order."""
        columns = zip(*pieces, strict=True)
        return Facts(*(torch.cat(column, dim=-1).index_select(-1, order) for column in columns))


class Done(NamedTuple):
    """Rows of the active batch that are done."""

    places: list[int]  # in the active batch
    value: Tensor  # (n, D)
    facts: Facts


def ending(seats: Sequence[Owner | None], goes_on: Sequence[bool]) -> list[int]:
    """The places of rows that somebody waits for and that do not go on."""
    pairs = zip(seats, goes_on, strict=True)
    return [place for place, (owner, going) in enumerate(pairs) if owner is not None and not going]


class Pieces(ActiveRows):
    """Keeps of every batch the pieces that are done, and puts them together when it is complete."""

    def __init__(self, control: Control):
        self._control = control
        self._pieces: dict[Request, list[tuple[list[int], Tensor, Facts]]] = {}

    @abstractmethod
    def evaluated(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None]
    ) -> tuple[Done | None, list[int]]:
        """As :meth:`advance`, with what is known of the rows that are done."""

    def advance(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None], open_rows: int
    ) -> tuple[list[int], list[int]]:
        done, fill = self.evaluated(evaluate, following, seats)
        if done is None:
            return [], fill
        self._deliver(done, seats)
        return done.places, fill

    def _deliver(self, done: Done, seats: Sequence[Owner | None]) -> None:
        owners: dict[Request, tuple[list[int], list[int]]] = {}  # positions in ``done``, and rows
        for position, place in enumerate(done.places):
            owner = seats[place]
            assert owner is not None
            positions, rows = owners.setdefault(owner[0], ([], []))
            positions.append(position)
            rows.append(owner[1])
        value, facts = done.value, done.facts
        if len(owners) > 1:  # one request after the other
            order = [position for positions, _ in owners.values() for position in positions]
            index = torch.tensor(order, dtype=torch.long, device=value.device)
            value, facts = value.index_select(0, index), facts.select(index)
        counts = [len(rows) for _, rows in owners.values()]
        pieces = zip(owners.items(), value.split(counts), facts.split(counts), strict=True)
        for (request, (_, rows)), v, f in pieces:
            self._pieces.setdefault(request, []).append((rows, v, f))

    def outcome(self, request: Request) -> Outcome:
        pieces = self._pieces.pop(request)
        rows = [row for some, _, _ in pieces for row in some]
        order = torch.argsort(torch.tensor(rows, dtype=torch.long, device=request.z.device))
        value = torch.cat([value for _, value, _ in pieces]).index_select(0, order)
        facts = Facts.joined([facts for _, _, facts in pieces], order)
        change, size, bound = facts.measured.unbind()
        status = classify(change, bound)
        stalled = facts.stalled & (status == int(Status.diverged))
        status = torch.where(stalled, int(Status.stagnated), status)
        status = torch.where(facts.spent, int(Status.max_iter), status)
        return Outcome(value, status, facts.steps, report_residual(change, size, self._control))
