"""A solve that waits for its rows, and what is written down of a row when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..adjoints.equation import Equation
from ..solvers.base import Control, Outcome, StepSolver
from ..solvers.measure import classify, report_residual
from ..types import Status
from .modes import Modes

__all__ = ["Done", "Facts", "Request", "ending"]


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


def ending(waited_for: Sequence[bool], goes_on: Sequence[bool]) -> list[int]:
    """The places of rows that somebody waits for and that do not go on."""
    pairs = zip(waited_for, goes_on, strict=True)
    return [place for place, (waited, going) in enumerate(pairs) if waited and not going]


@dataclass(eq=False)
class Request:
    """A solve that waits for its rows.

    Attributes:
        solver: its method.
        equation: its equation, with the context of all rows.
        z: (B, D) starting states.
        control: its stopping rule.
        modes: of the thread that it comes from.
        number: of the pass that it belongs to.
        entered: rows that have joined the active batch so far.
        missing: rows that are not done.
    """

    solver: StepSolver
    equation: Equation
    z: Tensor
    control: Control
    modes: Modes
    number: int
    entered: int = 0
    missing: int = field(init=False)
    _pieces: list[tuple[list[int], Tensor, Facts]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.z.shape[0]

    def deliver(self, rows: list[int], value: Tensor, facts: Facts) -> None:
        """Take in finished rows: their places in the batch, (n, D) values, and what is known of them."""
        self._pieces.append((rows, value, facts))
        self.missing -= len(rows)

    def outcome(self) -> Outcome:
        """The whole batch, in its order; every row must be done."""
        rows = [row for some, _, _ in self._pieces for row in some]
        order = torch.argsort(torch.tensor(rows, dtype=torch.long, device=self.z.device))
        value = torch.cat([value for _, value, _ in self._pieces]).index_select(0, order)
        facts = Facts.joined([facts for _, _, facts in self._pieces], order)
        change, size, bound = facts.measured.unbind()
        status = classify(change, bound)
        stalled = facts.stalled & (status == int(Status.diverged))
        status = torch.where(stalled, int(Status.stagnated), status)
        status = torch.where(facts.spent, int(Status.max_iter), status)
        self.equation.evaluations += int(facts.steps.sum())
        return Outcome(value, status, facts.steps, report_residual(change, size, self.control))
