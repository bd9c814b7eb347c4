"""Broyden's method by its steps alone: one vector a step instead of two, two products a step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .memory import free_to_look, free_to_write
from .stack import add_combined, combined, dots, joined

__all__ = ["Steps"]

_ROOM = 4  # steps for which there is memory when it is asked for


class Steps(NamedTuple):
    """The last steps ``s_1 .. s_m`` of Broyden's first method with the start ``-I``.

    Kelley (1995, section 7.3): the next step for the residual r is ``v / (1 - c_m)``, where
    ``v = r + c_1 s_2 + ... + c_(m-1) s_m`` and ``c_j = s_j . (r + c_1 s_2 + ... + c_(j-1) s_j) / ||s_j||^2``.
    The c are linear in the products ``s_i . r``, by a triangular matrix that grows by one row a step, made of
    products of the steps with the newest: so all products of a step with the history are made at once, and
    on small states a step takes a dozen operations however long the history is.

    Attributes:
        memory: (b, n, D) the steps, oldest first, in the first m places.
        table: (b, n, n) the matrix, in the first m rows and columns; zero in rows of the batch that started
            anew, for what was before.
        count: m.
    """

    memory: Tensor
    table: Tensor
    count: int

    @staticmethod
    def first(step: Tensor) -> Steps:
        """After a plain step, (b, D)."""
        return Steps(step[:, None], _inverse(step, torch.linalg.vecdot(step, step))[:, None, None], 1)

    def next(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """v, (b, D), and ``1 - c_m``, (b, 1), for the (b, D) residual r."""
        m, r = self.count, r[:, None]
        c = dots(self.table[:, :m, :m], dots(self.memory[:, :m], r))
        v = r if m == 1 else add_combined(r, self.memory[:, 1:m], c[:, :, : m - 1])
        return v[:, 0], 1 - c[:, :, m - 1]

    def extended(self, step: Tensor, keep: Tensor | None = None) -> Steps:
        """With one step more.

        Args:
            step: (b, D) the newest.
            keep: (b, 1) bool, False in rows that forget the steps before it; None: no row does.
        """
        m, memory, step = self.count, self.memory, step[:, None]
        table = self.table if keep is None else self.forgotten(keep).table
        write = free_to_write(step) and free_to_look(step)
        if write:
            memory, table = (memory, table) if memory.shape[1] > m else _roomier(memory, table)
            memory[:, m : m + 1] = step
        else:
            memory = joined(memory, step)
        products = dots(memory[:, 1 : m + 1], step)
        weight = _inverse(step, products[:, :, m - 1 :])
        row = combined(table[:, :m, :m], products) * weight
        if write:
            newest = table[:, m : m + 1]
            newest[:, :, :m], newest[:, :, m : m + 1] = row, weight
        else:
            wider = torch.nn.functional.pad(table, (0, 1))
            table = joined(wider, torch.cat((row, weight), dim=2))
        return Steps(memory, table, m + 1)

    def forgotten(self, keep: Tensor) -> Steps:
        """Without a past in the rows where ``keep``, (b, 1) bool, is False; theirs may hold NaN."""
        return self._replace(table=torch.where(keep[:, None], self.table, 0.0))

    def last(self, most: int) -> Steps:
        """Without the oldest beyond ``most``; rows that build on them must have started anew."""
        more = self.count - most
        if more <= 0:
            return self
        return Steps(self.memory[:, more:], self.table[:, more:, more:], most)


def _roomier(memory: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    b, m, width = memory.shape
    more = memory.new_empty(b, m + _ROOM, width)
    more[:, :m] = memory
    return more, torch.nn.functional.pad(table, (0, _ROOM, 0, _ROOM))


def _inverse(step: Tensor, square: Tensor) -> Tensor:
    """1 / ||step||^2, of the shape of ``square``, its inverse; zero for no step and where it would overflow.

    Where derivatives are recorded it is made of the step divided by its length: torch's derivative of an
    inverse squares it, and a step of 1e-10 is then infinite in float32 and makes NaN of all that it meets.
    """
    moved = square > 1e3 * torch.finfo(square.dtype).tiny
    if free_to_write(step):
        return moved / torch.where(moved, square, 1.0)
    moved = moved.detach()
    inverse = moved / torch.where(moved, square.detach(), 1.0).sqrt()
    unit = step * inverse.reshape(*step.shape[:-1], 1)
    nearly_one = torch.where(moved, torch.linalg.vecdot(unit, unit).reshape(square.shape), 1.0)
    return inverse * (inverse / nearly_one)
