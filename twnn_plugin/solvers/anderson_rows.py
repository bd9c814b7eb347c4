"""Anderson acceleration by a compiled kernel over the rows, each with a history and an age of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    # Rows of ``last``, ``numbers`` and ``slots`` behind those of the batch mean nothing.
    kernel: kernels.Anderson
    step: int  # made by the oldest row
    even: bool  # whether all rows have made as many
    fz: Tensor | None  # (b, D) the last f(z)
    last: Tensor | None  # (b, D) the last residual, in units
    # (b, 2 m + 3 + n) gamma and weight of each slot, smallest ||r||, blur, steps made, and the parts' units
    numbers: Tensor | None
    slots: tuple[Tensor, ...] = ()  # (b, 2, D) each, made when they are needed: q and p
    taken: int = 0  # differences so far


@dataclass(frozen=True)
class AndersonRows(StepSolver):
    """The steps of :class:`~twnn_plugin.solvers.anderson.Anderson`, where nothing is differentiated.

    A slot whose weight is zero is never read, so that a row whose history ends, or which starts anew among
    others, is a matter of its numbers alone.
    """

    settings: Settings

    def init(self, z: Tensor) -> _History:
        given, eps = self.settings, torch.finfo(z.dtype).eps
        kernel = kernels.Anderson(
            z,
            parts=given.parts,
            most=self._most(z),
            start=given.start,
            damping=given.damping,
            restart=given.restart,
            noise=given.noise * eps,
            blurred=given.blur * eps,
        )
        return _History(kernel, 0, True, None, None, None)

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _History
    ) -> tuple[Tensor, _History]:
        given = self.settings
        kernel, step, even, before, last, numbers, slots, taken = state
        newest = step == given.start - 1  # the first difference needs only the last pair
        fz = kernels.same(fz, r)
        if even and (step < given.start - 1 or (newest and not given.parts)):
            plain = fz if given.damping == 1 else torch.add(z, r, alpha=given.damping)
            if not newest:
                return plain, state._replace(step=step + 1)
            return plain, _History(kernel, step + 1, True, fz, r, self._numbers(r, given.start))
        most = self._most(r)
        if numbers is None:
            numbers = self._numbers(r, step)
        if not even or step >= max(given.start, 1):
            if len(slots) < most:
                slots = (*slots, r.new_empty((r.shape[0], 2, r.shape[1])))
            taken += 1
        following = kernel.step(
            fz,
            r,
            fz if before is None else before,
            r if last is None else last,
            slots,
            numbers,
            max(taken - 1, 0) % most,
        )
        return following, _History(kernel, step + 1, even, fz, r, numbers, slots, taken)

    def keep(self, state: _History, rows: Tensor) -> _History:
        # What it was given is others', and is copied; what it has made itself moves to the front.
        fz = None if state.fz is None else state.fz.index_select(0, rows)
        own = [x for x in (state.last, state.numbers, *state.slots) if x is not None]
        found = iter(kernels.shrunk(own, rows))
        last = None if state.last is None else next(found)
        numbers = None if state.numbers is None else next(found)
        return state._replace(fz=fz, last=last, numbers=numbers, slots=tuple(found))

    def renew(self, state: _History, rows: Tensor, z: Tensor) -> _History:
        numbers = self._numbers(z, state.step) if state.numbers is None else state.numbers
        numbers.index_fill_(0, rows, 0)
        # Rows that joined have no last value yet; it is not read before they have made a step.
        return state._replace(even=False, numbers=numbers)

    def _most(self, like: Tensor) -> int:
        # Differences that span the whole space leave no residual, and say nothing of curvature.
        return min(self.settings.memory, max(1, like.shape[1] // 2))

    def _numbers(self, like: Tensor, age: int) -> Tensor:
        """Those of rows that have made ``age`` steps."""
        most = self._most(like)
        numbers = like.new_zeros((like.shape[0], 2 * most + 3 + len(self.settings.parts)))
        numbers[:, 2 * most + 2] = age
        return numbers
