"""States of several parts in units of their own, for methods that take norms and products over the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import Problem, StepSolver

__all__ = ["InUnits", "units_of_parts"]


def units_of_parts(fz: Tensor, parts: Sequence[int]) -> Tensor:
    """(b, D) a power of two near the rms of each part, row by row; 1 where there is none.

    No digit is lost to it, parts of like size stay the whole that they are, and a derivative has no part that
    comes from it (almost everywhere).

    Args:
        fz: (b, D) values of ``f``.
        parts: their widths.
    """
    units = []
    for part in fz.detach().split(list(parts), dim=1):
        size = torch.linalg.vector_norm(part, dim=1, keepdim=True) / part.shape[1] ** 0.5
        size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0)
        unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
        units.append(unit.expand_as(part))
    return torch.cat(units, dim=1)


class _Measured(NamedTuple):
    made: int  # plain steps so far
    units: Tensor | None  # (b, D), once they are made
    inner: Any  # the method's own state, from then on


@dataclass(frozen=True)
class InUnits(StepSolver):
    """A method that sees each part of the state as a multiple of the part's size, after some plain steps.

    Over the plain row the part with the largest numbers would decide alone, and the others would be left to
    directions that hardly differ in it. Where the search begins, sizes may say nothing (a part is zero, or
    has not heard of the others yet).

    Args:
        method: does not evaluate ``f`` in its step.
        parts: widths of the parts.
        after: plain steps, >= 0, before the sizes are measured and the method begins.
    """

    method: StepSolver
    parts: tuple[int, ...]
    after: int = 2

    keeps_residual: ClassVar[bool] = False

    def compiled(self) -> StepSolver:
        return InUnits(self.method.compiled(), self.parts, self.after)

    def init(self, z: Tensor) -> _Measured:
        return _Measured(0, None, None)

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Measured
    ) -> tuple[Tensor, _Measured]:
        made, units, inner = state
        if made < self.after:
            return fz, _Measured(made + 1, None, None)
        if units is None:
            units = units_of_parts(fz, self.parts)
            inner = self.method.init(z / units)
        following, inner = self.method.step(problem, z / units, fz / units, r / units, inner)
        return following * units, _Measured(made, units, inner)

    def keep(self, state: _Measured, rows: Tensor) -> _Measured:
        if state.units is None:
            return state
        return state._replace(
            units=state.units.index_select(0, rows), inner=self.method.keep(state.inner, rows)
        )
