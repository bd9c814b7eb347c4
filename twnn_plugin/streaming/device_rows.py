"""What is known of the rows that are being solved for, on an accelerator, where every look costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers.base import Control
from ..solvers.book import GROWTH, PATIENCE, stagnated
from ..solvers.measure import Threshold, measure
from ..solvers.memory import device_only
from ..trees import take
from .active_rows import Evaluate, Following
from .pieces import Done, Facts, Pieces, ending
from .request import Owner

__all__ = ["DeviceRows"]


class DeviceRows(Pieces):
    """The b rows in the active batch; a row that is done stands still.

    Args:
        z: a tensor of the dtype and device of the states.
        control: the stopping rule.
        every: evaluations between two looks of the host.
    """

    def __init__(self, z: Tensor, control: Control, every: int):
        super().__init__(control)
        self._threshold, self._every = Threshold(control, z), every
        self._rows = _Rows.new(z[:0])

    @property
    def z(self) -> Tensor:
        return self._rows.z

    # Who is here.

    def extend(self, z: Tensor, owners: Sequence[Owner]) -> None:
        pairs = zip(self._rows, _Rows.new(z), strict=True)
        self._rows = _Rows(*(torch.cat(pair) for pair in pairs))

    def replace(self, places: Sequence[int], index: Tensor, z: Tensor, owners: Sequence[Owner]) -> None:
        pairs = zip(self._rows, _Rows.new(z), strict=True)
        self._rows = _Rows(*(old.index_copy(0, index, new) for old, new in pairs))

    def keep(self, places: Sequence[int], index: Tensor) -> None:
        self._rows = take(self._rows, index)

    # A few evaluations.

    def evaluated(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None]
    ) -> tuple[Done | None, list[int]]:
        fill = []
        with device_only():
            for _ in range(self._every):
                rows = self._rows
                fill.append(rows.alive.sum())
                fz = evaluate(rows.z)
                r = fz - rows.z
                rows, verdict = rows.look(fz, r, self._control, self._threshold)
                z = verdict.values(rows.z, fz, following(rows.z, fz, r))
                self._rows = rows._replace(z=z)
        alive = self._rows.alive
        seen = torch.cat([torch.stack(fill), alive.long()]).tolist()  # the host waits here
        goes = seen[len(fill) :]
        places = ending(seats, goes)
        if not places:
            return None, seen[: len(fill)]
        index = torch.tensor(places, dtype=torch.long, device="cpu").to(alive.device, non_blocking=True)
        return Done(places, self.z.index_select(0, index), self._rows.facts(index)), seen[: len(fill)]


class _Rows(NamedTuple):
    """What is known of each of them."""

    z: Tensor  # (b, D) the iterate; of a finished row, its value
    alive: Tensor  # (b,) bool: not finished
    age: Tensor  # (b,) evaluations while alive
    measured: Tensor  # (b, 3) change, size and bound, last measured while alive
    stalled: Tensor  # (b,) bool: finished by stagnation
    spent: Tensor  # (b,) bool: ran out of evaluations
    over: Tensor  # (b,) bool: the last change was beyond the limit
    limit: Tensor  # (b,) changes from which on a row has diverged
    earlier: Tensor  # (b,) change when stagnation was last looked for; NaN before

    @staticmethod
    def new(z: Tensor) -> _Rows:
        """Rows that start at ``z``."""
        no = z.new_zeros(z.shape[0], dtype=torch.bool)
        zero = z.new_zeros(z.shape[0])
        return _Rows(
            z, ~no, no.long(), z.new_zeros(len(no), 3), no, no, no, zero, torch.full_like(zero, math.nan)
        )

    def look(self, fz: Tensor, r: Tensor, control: Control, threshold: Threshold) -> tuple[_Rows, _Verdict]:
        """The rows with an evaluation measured, and who goes on.

        The rules are those of :class:`~twnn_plugin.solvers.book.Book`, with a count of evaluations for every
        row.
        """
        alive = self.alive
        if control.seen is not None:
            r = fz - control.seen.rounded(self.z)
        change, size = measure(r, fz, control.norm, control.parts)
        bound = threshold(size)
        age = self.age + alive
        limit = torch.where(age == 1, GROWTH * (change + size), self.limit)
        low = change < limit  # false for NaN
        over = (change < math.inf) ^ low
        # An accelerated step may overshoot and the next plain one return: twice over is divergence.
        going_on = alive & (change > bound) & (low | (over > self.over))
        due = age % PATIENCE == 0
        stuck = due & stagnated(change, self.earlier, size, control.coarse)
        going_on = going_on & ~stuck
        spent = going_on & (age >= control.max_iter)
        broken = alive & ~torch.isfinite(change + bound)  # their value is what f returned
        measured = torch.stack((change, size, bound.expand_as(change)), dim=1)
        rows = _Rows(
            self.z,
            going_on & ~spent,
            age,
            torch.where(alive[:, None], measured, self.measured),
            self.stalled | (stuck & alive),
            self.spent | spent,
            over,
            limit,
            torch.where(due, change, self.earlier),
        )
        return rows, _Verdict(rows.alive, broken | spent)

    def facts(self, rows: Tensor) -> Facts:
        """What is known of some rows."""
        measured, age, stalled, spent = (
            column.index_select(0, rows) for column in (self.measured, self.age, self.stalled, self.spent)
        )
        return Facts(measured.T, age, stalled, spent)


class _Verdict(NamedTuple):
    """What becomes of the rows after an evaluation, (b,) bool each."""

    goes_on: Tensor
    takes_f: Tensor  # of those that end: their value is f(z) rather than z

    def values(self, z: Tensor, fz: Tensor, following: Tensor) -> Tensor:
        """(b, D) the next iterate where a row goes on, its value where it ends."""
        ended = torch.where(self.takes_f[:, None], fz, z)
        return torch.where(self.goes_on[:, None], following, ended)
