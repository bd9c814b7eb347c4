"""What is known of the rows that are being solved for, on the CPU, where looks cost little."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers.base import Control
from ..solvers.book import GROWTH, PATIENCE, stagnated
from ..solvers.measure import Threshold, measure
from .active_rows import Evaluate, Following
from .pieces import Done, Facts, Pieces, ending
from .request import Owner

__all__ = ["HostRows"]


class HostRows(Pieces):
    """The b rows in the active batch, and the rules of :class:`~twnn_plugin.solvers.book.Book` for each.

    The host knows the age of every row, so that rules which few rows are due for cost nothing elsewhere. What
    becomes of a row after it is done is ignored until another takes its place.

    Args:
        z: a tensor of the dtype and device of the states.
        control: the stopping rule.
    """

    def __init__(self, z: Tensor, control: Control):
        super().__init__(control)
        self._z, self._threshold = z[:0], Threshold(control, z)
        self._now = 0  # evaluations so far
        self._born: list[int] = []  # of each row: how many there had been when it joined
        self._fresh: list[int] = []  # places of rows that were never looked at
        self._limit = z.new_empty(0)  # (b,) changes from which on a row has diverged
        self._earlier = z.new_empty(0)  # (b,) change when stagnation was last looked for; NaN before
        self._over: Tensor | None = None  # (b,) bool: the last change was beyond the limit; None: none was

    @property
    def z(self) -> Tensor:
        return self._z

    # Who is here.

    def extend(self, z: Tensor, owners: Sequence[Owner]) -> None:
        count = len(z)
        self._fresh += range(len(self._born), len(self._born) + count)
        self._born += [self._now] * count
        self._z = torch.cat([self._z, z])
        self._limit = torch.cat([self._limit, z.new_empty(count)])
        self._earlier = torch.cat([self._earlier, z.new_full((count,), math.nan)])
        if self._over is not None:
            self._over = torch.cat([self._over, self._over.new_zeros(count)])

    def replace(self, places: Sequence[int], index: Tensor, z: Tensor, owners: Sequence[Owner]) -> None:
        self._fresh += places
        for place in places:
            self._born[place] = self._now
        self._z = self._z.index_copy(0, index, z)
        self._earlier = self._earlier.index_fill(0, index, math.nan)
        if self._over is not None:
            self._over = self._over.index_fill(0, index, False)

    def keep(self, places: Sequence[int], index: Tensor) -> None:
        fresh = set(self._fresh)
        self._fresh = [new for new, old in enumerate(places) if old in fresh]
        self._born = [self._born[place] for place in places]
        self._z, self._limit, self._earlier = (
            x.index_select(0, index) for x in (self._z, self._limit, self._earlier)
        )
        if self._over is not None:
            self._over = self._over.index_select(0, index)

    # One evaluation.

    def evaluated(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None]
    ) -> tuple[Done | None, list[int]]:
        z, open_rows = self._z, sum(owner is not None for owner in seats)
        fz = evaluate(z)
        r = fz - z
        done = self._done(z, fz, r, seats)
        if done is None or len(done.places) < open_rows:
            self._z = following(z, fz, r)
        return done, [open_rows]

    def _done(self, z: Tensor, fz: Tensor, r: Tensor, seats: Sequence[Owner | None]) -> Done | None:
        control = self._control
        self._now += 1
        if control.seen is not None:
            r = fz - control.seen.rounded(z)
        change, size = measure(r, fz, control.norm, control.parts)
        bound = self._threshold(size)
        going_on, stuck = self._going_on(change, size, bound)
        goes = going_on.tolist()
        oldest = self._now - control.max_iter  # rows born then have had their last evaluation
        spent = [place for place, born in enumerate(self._born) if born <= oldest and goes[place]]
        for place in spent:
            goes[place] = False
        places = ending(seats, goes)
        if not places:
            return None
        index = torch.tensor(places, device=z.device)
        measured = torch.stack((change, size, bound.expand_as(change))).index_select(1, index)
        none = torch.zeros_like(index, dtype=torch.bool)
        late = none
        if spent:
            exhausted = set(spent)
            late = torch.tensor([place in exhausted for place in places], device=z.device)
        value = z.index_select(0, index)
        # Summed, so that one number says whether a closer look is needed.
        if spent or not math.isfinite(float(measured.sum())):
            takes_f = late | ~torch.isfinite(measured[0] + measured[2])
            value = torch.where(takes_f[:, None], fz.index_select(0, index), value)
        steps = torch.tensor([self._now - self._born[place] for place in places], device=z.device)
        stalled = none if stuck is None else stuck.index_select(0, index)
        return Done(places, value, Facts(measured, steps, stalled, late))

    def _going_on(self, change: Tensor, size: Tensor, bound: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b,) bool: rows that are not done, if they may be evaluated again; and those that stagnate."""
        if self._fresh:
            limit, fresh = GROWTH * (change + size), torch.tensor(self._fresh, device=change.device)
            self._limit = self._limit.index_copy(0, fresh, limit.index_select(0, fresh))
            self._fresh = []
        low = change < self._limit  # false for NaN
        if bool(low.all()):
            self._over = None
        else:  # an accelerated step may overshoot and the next plain one return: twice over is divergence
            over = (change < math.inf) ^ low
            low = low | (over if self._over is None else over > self._over)
            self._over = over
        going_on = (change > bound) & low
        due = [place for place, born in enumerate(self._born) if (self._now - born) % PATIENCE == 0]
        if not due:
            return going_on, None
        index = torch.tensor(due, device=change.device)
        is_due = torch.zeros_like(going_on).index_fill_(0, index, True)
        stuck = is_due & stagnated(change, self._earlier, size, self._control.coarse)
        self._earlier = torch.where(is_due, change, self._earlier)
        return going_on & ~stuck, stuck
