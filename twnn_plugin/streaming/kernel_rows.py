"""What is known of the rows that are being solved for, on the CPU, where compiled kernels can keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..solvers.base import Control, Outcome
from ..solvers.book_rows import CODES, rule_of
from .active_rows import ActiveRows, Evaluate, Following
from .request import Owner, Request

__all__ = ["KernelRows"]


class KernelRows(ActiveRows):
    """:class:`~twnn_plugin.streaming.host_rows.HostRows` in one pass over the rows an evaluation.

    Args:
        z: a tensor of the dtype and device of the states.
        control: the stopping rule.
        capacity: rows at most.
    """

    def __init__(self, z: Tensor, control: Control, capacity: int):
        self._z = z[:0]
        self._guests = kernels.Guests(self._z, rule_of(control, z.dtype), CODES, capacity)
        self._begin: dict[Request, int] = {}  # where what becomes of its rows is written down

    @property
    def z(self) -> Tensor:
        return self._z

    def extend(self, z: Tensor, owners: Sequence[Owner]) -> None:
        here = self._z.shape[0]
        self._z = torch.cat([self._z, z])
        self._enter(range(here, here + len(owners)), owners)

    def replace(self, places: Sequence[int], index: Tensor, z: Tensor, owners: Sequence[Owner]) -> None:
        self._z = self._z.index_copy(0, index, z)
        self._enter(places, owners)

    def _enter(self, places: Sequence[int], owners: Sequence[Owner]) -> None:
        begins, guests = self._begin, self._guests
        for request in dict.fromkeys(request for request, _ in owners):
            if request not in begins:
                begins[request] = guests.reserve(request.z.shape[0])
        guests.enter(places, [begins[request] + row for request, row in owners])

    def keep(self, places: Sequence[int], index: Tensor) -> None:
        self._z = self._z.index_select(0, index)
        self._guests.keep(index)

    def advance(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None], open_rows: int
    ) -> tuple[list[int], list[int]]:
        z, guests = self._z, self._guests
        fz = evaluate(z)
        r = torch.empty_like(z, memory_format=torch.contiguous_format)
        at, to = kernels.same(z, r), kernels.same(fz, r)
        ended, _ = guests.look(at, to, r)
        places = guests.leave(at, to) if ended else []
        if ended < open_rows:
            self._z = following(z, fz, r)
        return places, [open_rows]

    def outcome(self, request: Request) -> Outcome:
        return Outcome(*self._guests.collect(self._begin.pop(request)))
