"""What is known of the rows that are being solved for, on the CPU, where compiled kernels can keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..solvers.base import Control
from ..solvers.book_rows import CODES, rule_of
from .active_rows import ActiveRows, Evaluate, Following
from .request import Done, Facts

__all__ = ["KernelRows"]


class KernelRows(ActiveRows):
    """:class:`~twnn_plugin.streaming.host_rows.HostRows` in one pass over the rows an evaluation.

    Args:
        z: a tensor of the dtype and device of the states.
        control: the stopping rule.
    """

    def __init__(self, z: Tensor, control: Control):
        self._z = z[:0]
        self._rows = kernels.Rows(self._z, rule_of(control, z.dtype), CODES)

    @property
    def z(self) -> Tensor:
        return self._z

    def extend(self, z: Tensor) -> None:
        self._z = torch.cat([self._z, z])
        self._rows.extend(len(z))

    def replace(self, places: Sequence[int], index: Tensor, z: Tensor) -> None:
        self._z = self._z.index_copy(0, index, z)
        self._rows.renew(index)

    def keep(self, places: Sequence[int], index: Tensor) -> None:
        self._z = self._z.index_select(0, index)
        self._rows.keep(index)

    def advance(
        self, evaluate: Evaluate, following: Following, waited_for: Sequence[bool]
    ) -> tuple[Done | None, list[int]]:
        z, rows, open_rows = self._z, self._rows, sum(waited_for)
        fz = evaluate(z)
        r = torch.empty_like(z, memory_format=torch.contiguous_format)
        measured = z.new_empty((3, len(z)))
        ended, newest = rows.look(kernels.same(z, r), kernels.same(fz, r), r, measured)
        done = None
        if ended:
            index, status, steps = rows.take_finished()
            late = status == CODES.max_iter
            value = z.index_select(0, index)
            if newest:
                takes_f = late | (status == CODES.non_finite)
                value = torch.where(takes_f[:, None], fz.index_select(0, index), value)
            facts = Facts(measured.index_select(1, index), steps, status == CODES.stagnated, late)
            done = Done(index.tolist(), value, facts)
        if ended < open_rows:
            self._z = following(z, fz, r)
        return done, [open_rows]
