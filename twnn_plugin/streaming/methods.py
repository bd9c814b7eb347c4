"""The solver of an active batch whose rows began at different times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..solvers.base import StepSolver
from ..trees import leaves, rebuild

__all__ = ["Cohorts", "Method", "Renewing"]

EvaluatePart = Callable[[Tensor, int], Tensor]
"""``f`` for the rows from a place on."""


class _Slice:
    """The equation of a cohort's rows (a ``Problem``), for methods that evaluate ``f`` in a step."""

    can_leave = False
    leave_share = 0.0

    def __init__(self, evaluate: EvaluatePart, begin: int, size: int):
        self.size, self.evaluations = size, 0
        self._evaluate, self._begin = evaluate, begin

    def evaluate(self, z: Tensor) -> Tensor:
        """``f`` for these rows."""
        self.evaluations += self.size
        return self._evaluate(z, self._begin)

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("rows leave by the pool")


class Method(ABC):
    """Steps an active batch.

    Args:
        solver: the method.
        evaluate: for methods that evaluate ``f`` in a step.
    """

    refill: ClassVar[float]
    """Share of the active batch's places that must be free before rows join."""

    def __init__(self, solver: StepSolver, evaluate: EvaluatePart):
        self.solver, self.evaluate = solver, evaluate

    @abstractmethod
    def following(self, z: Tensor, fz: Tensor, r: Tensor) -> Tensor:
        """The next iterates."""

    @abstractmethod
    def extend(self, new: Tensor, z: Tensor) -> None:
        """Rows have joined after the others; ``z`` are the iterates of all."""

    @abstractmethod
    def keep(self, places: Sequence[int], index: Callable[[Sequence[int]], Tensor]) -> None:
        """Only the rows in these places are left."""


class Renewing(Method):
    """For solvers with :meth:`~twnn_plugin.solvers.StepSolver.renew`: all rows are stepped as one."""

    refill = 0.125

    def __init__(self, solver: StepSolver, evaluate: EvaluatePart):
        super().__init__(solver, evaluate)
        self._size, self._state = 0, None

    def following(self, z: Tensor, fz: Tensor, r: Tensor) -> Tensor:
        problem = _Slice(self.evaluate, 0, self._size)
        following, self._state = self.solver.step(problem, z, fz, r, self._state)
        return following

    def extend(self, new: Tensor, z: Tensor) -> None:
        before, self._size = self._size, len(z)
        if not before:
            self._state = self.solver.init(z)
            return
        state = rebuild(self._state, lambda leaf: _padded(leaf, len(new)))
        self._state = self.solver.renew(state, torch.arange(before, len(z), device=z.device), z)

    def replace(self, index: Tensor, z: Tensor) -> None:
        """Rows have joined in these places; ``z`` are the iterates of all."""
        self._state = self.solver.renew(self._state, index, z)

    def keep(self, places: Sequence[int], index: Callable[[Sequence[int]], Tensor]) -> None:
        if len(places) < self._size:
            self._size = len(places)
            self._state = self.solver.keep(self._state, index(places)) if places else None


class _Cohort(NamedTuple):
    """Rows that lie next to each other in the batch and whose solver state is one tree."""

    size: int
    state: Any


class Cohorts(Method):
    """For any step solver: rows that joined at different times are stepped apart from each other.

    They are at different stages of a method: a history fills up, say. As soon as the states of two cohorts
    have the same structure they become one.
    """

    refill = 0.25  # gathering costs a pass over everything

    def __init__(self, solver: StepSolver, evaluate: EvaluatePart):
        super().__init__(solver, evaluate)
        self._cohorts: list[_Cohort] = []

    def following(self, z: Tensor, fz: Tensor, r: Tensor) -> Tensor:
        parts, cohorts, begin = [], [], 0
        for size, state in self._cohorts:
            here, there, way = (x.narrow(0, begin, size) for x in (z, fz, r))
            problem = _Slice(self.evaluate, begin, size)
            following, state = self.solver.step(problem, here, there, way, state)
            parts.append(following)
            cohorts.append(_Cohort(size, state))
            begin += size
        self._cohorts = cohorts
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extend(self, new: Tensor, z: Tensor) -> None:
        _append(self._cohorts, _Cohort(len(new), self.solver.init(new)))

    def keep(self, places: Sequence[int], index: Callable[[Sequence[int]], Tensor]) -> None:
        kept, cohorts, begin = set(places), list[_Cohort](), 0
        for size, state in self._cohorts:
            local = [i for i in range(size) if begin + i in kept]
            begin += size
            if not local:
                continue
            if len(local) < size:
                state = self.solver.keep(state, index(local))
            _append(cohorts, _Cohort(len(local), state))
        self._cohorts = cohorts


def _append(cohorts: list[_Cohort], cohort: _Cohort) -> None:
    """Put a cohort after the others, as one with the last if they have come to look alike."""
    if cohorts and _alike(cohorts[-1].state, cohort.state):
        last = cohorts.pop()
        cohort = _Cohort(last.size + cohort.size, _joined(last.state, cohort.state))
    cohorts.append(cohort)


def _padded(leaf: Any, count: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.cat([leaf, leaf.new_zeros((count, *leaf.shape[1:]))])


def _alike(a: Any, b: Any) -> bool:
    """Whether two solver states differ in their rows alone."""
    if _bare(a) != _bare(b):
        return False
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if isinstance(x, Tensor):
            if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
                return False
        elif x is not y and not bool(x == y):
            return False
    return True


def _bare(state: Any) -> Any:
    """The nesting of a state and the types of its leaves."""
    return rebuild(state, type)


def _joined(a: Any, b: Any) -> Any:
    """Two trees that are alike, their rows one after the other."""
    others = leaves(b)

    def join(leaf: Any) -> Any:
        other = next(others)
        return torch.cat([leaf, other]) if isinstance(leaf, Tensor) else leaf

    return rebuild(a, join)
