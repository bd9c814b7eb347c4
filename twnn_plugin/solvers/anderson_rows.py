"""Anderson acceleration by a compiled kernel over the rows, each with a history and an age of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .base import Problem, StepSolver

__all__ = ["AndersonRows", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Options of :class:`~twnn_plugin.solvers.anderson.Anderson`, and its constants."""

    memory: int
    damping: float
    start: int
    restart: float
    noise: float
    blur: float
    parts: tuple[int, ...] = ()


class _History(NamedTuple):
    step: int  # made by the oldest row
    even: bool  # whether all rows have made as many
    fz: Tensor | None  # (b, D) the last f(z)
    memory: Tensor | None  # (b, 2 m + 1, D) the pairs q, p of each slot, and the last residual
    # (b, 2 m + 3 + n) gamma and weight of each slot, smallest ||r||, blur, steps made, and the parts' units
    numbers: Tensor | None


@dataclass(frozen=True)
class AndersonRows(StepSolver):
    """The steps of :class:`~twnn_plugin.solvers.anderson.Anderson`, where nothing is differentiated.

    A slot whose weight is zero is never read, so that a row whose history ends, or which starts anew among
    others, is a matter of its numbers alone.
    """

    settings: Settings

    keeps_residual: ClassVar[bool] = False

    def init(self, z: Tensor) -> _History:
        return _History(0, True, None, None, None)

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _History
    ) -> tuple[Tensor, _History]:
        given, step = self.settings, state.step
        newest = step == given.start - 1  # the first difference needs only the last pair
        if state.even and (step < given.start - 1 or (newest and not given.parts)):
            plain = fz if given.damping == 1 else torch.add(z, r, alpha=given.damping)
            if not newest:
                return plain, state._replace(step=step + 1)
            memory, numbers = self._room(fz, given.start)
            memory[:, -1] = r
            return plain, _History(step + 1, True, fz, memory, numbers)
        memory, numbers = state.memory, state.numbers
        if memory is None or numbers is None:
            memory, numbers = self._room(fz, step)
        eps = torch.finfo(fz.dtype).eps
        following = kernels.anderson(
            fz,
            r,
            fz if state.fz is None else state.fz,
            memory,
            numbers,
            parts=kernels.widths(given.parts),
            newest=step % (memory.shape[1] // 2),
            start=given.start,
            damping=given.damping,
            restart=given.restart,
            noise=given.noise * eps,
            blurred=given.blur * eps,
        )
        return following, _History(step + 1, state.even, fz, memory, numbers)

    def keep(self, state: _History, rows: Tensor) -> _History:
        fz, memory, numbers = state.fz, state.memory, state.numbers
        return state._replace(
            fz=None if fz is None else fz.index_select(0, rows),
            memory=None if memory is None else kernels.shrunk(memory, rows),
            numbers=None if numbers is None else kernels.shrunk(numbers, rows),
        )

    def renew(self, state: _History, rows: Tensor, z: Tensor) -> _History:
        memory, numbers = state.memory, state.numbers
        if memory is None or numbers is None:
            memory, numbers = self._room(z, state.step)
        numbers.index_fill_(0, rows, 0)
        # Rows that joined have no last value yet; it is not read before they have made a step.
        return _History(state.step, False, state.fz, memory, numbers)

    def _room(self, like: Tensor, age: int) -> tuple[Tensor, Tensor]:
        """Memory for the histories of rows that have made ``age`` steps."""
        b, width = like.shape
        # Differences that span the whole space leave no residual, and say nothing of curvature.
        slots = min(self.settings.memory, max(1, width // 2))
        numbers = like.new_zeros((b, 2 * slots + 3 + len(self.settings.parts)))
        numbers[:, 2 * slots + 2] = age
        return like.new_empty((b, 2 * slots + 1, width)), numbers
