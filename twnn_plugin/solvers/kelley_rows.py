"""Broyden's method, alone and in ``auto``, by compiled kernels: each row with steps and an age of its own.

What is kept, and when a row begins anew, is as in :mod:`~twnn_plugin.solvers.broyden` and
:mod:`~twnn_plugin.solvers.auto`, which are in charge where something is differentiated. There the steps of
all rows lie beside each other, so that a product with all of them is one operation; here a row reads its own,
in order, while they are in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..trees import take
from .base import Control, Problem, StepSolver
from .measure import EPS

__all__ = ["AutoRows", "BroydenRows", "Watch"]


class _Past(NamedTuple):
    # Rows behind those of the batch mean nothing.
    kernel: kernels.Kelley
    numbers: Tensor  # (b, n) the kernel's
    slots: tuple[Tensor, ...] = ()  # (b, D) each, made when needed: the steps of each row, oldest first


@dataclass(frozen=True)
class BroydenRows(StepSolver):
    """The steps of :class:`~twnn_plugin.solvers.broyden.Broyden`, where nothing is differentiated."""

    memory: int
    restart: float
    singular: float

    keeps_residual: ClassVar[bool] = False

    def init(self, z: Tensor) -> _Past:
        kernel = kernels.Kelley(z, memory=self.memory, singular=self.singular, restart=self.restart)
        return _Past(kernel, kernel.nothing(z))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Past) -> tuple[Tensor, _Past]:
        kernel, numbers, slots = state
        if len(slots) < self.memory:
            slots = (*slots, torch.empty_like(r))
        z, fz = kernels.same(z, r), kernels.same(fz, r)
        return kernel.broyden(z, fz, r, numbers, slots), _Past(kernel, numbers, slots)

    def keep(self, state: _Past, rows: Tensor) -> _Past:
        numbers, *slots = kernels.shrunk([state.numbers, *state.slots], rows)
        return state._replace(numbers=numbers, slots=tuple(slots))

    def renew(self, state: _Past, rows: Tensor, z: Tensor) -> _Past:
        state.numbers.index_fill_(0, rows, 0)
        return state


@dataclass(frozen=True)
class Watch:
    """When ``auto`` changes its mind about a row: the constants of :mod:`~twnn_plugin.solvers.auto`."""

    newton: int
    singular: float
    restart: float
    tossed: float
    patience: int
    soon: float


class _Rows(NamedTuple):
    kernel: kernels.Kelley
    numbers: Tensor  # (b, n) the kernel's
    # (b, D) each: the steps of each row, oldest first; of a row with plain steps the last one, in the first.
    slots: tuple[Tensor, ...]
    back: Tensor | None  # (b, D) f at the state with the smallest ||r||, once a row was accelerated
    newton: Any  # what Newton's method keeps, while a row has it
    some_plain: bool


@dataclass(frozen=True)
class AutoRows(StepSolver):
    """The steps of :class:`~twnn_plugin.solvers.auto.Auto`, where nothing is differentiated.

    Args:
        memory: steps kept.
        watch: the constants.
        control: when a row is finished.
        newton: Newton's method, with an ``enter`` for rows that begin; it steps all rows, and is asked only
            where one of them has it.
    """

    memory: int
    watch: Watch
    control: Control
    newton: Any

    keeps_residual: ClassVar[bool] = False

    def init(self, z: Tensor) -> _Rows:
        watch, control = self.watch, self.control
        kernel = kernels.Kelley(
            z,
            memory=self.memory,
            singular=watch.singular,
            restart=watch.restart,
            tossed=watch.tossed,
            patience=watch.patience,
            soon=watch.soon,
            tol=control.tol,
            floor=EPS,
            relative=control.stop == "rel",
            scaled=control.scale is not None,
            largest=control.norm == "max",
            parts=control.parts,
        )
        scale = None if control.scale is None else control.scale.detach()
        return _Rows(kernel, kernel.numbers(z, scale), (torch.empty_like(z),), None, None, True)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Rows) -> tuple[Tensor, _Rows]:
        kernel, numbers, slots, back, newton, some_plain = state
        z, fz = kernels.same(z, r), kernels.same(fz, r)
        if some_plain:
            fast = kernel.judge(z, fz, r, numbers, slots)
            if not fast:
                return fz, state
            some_plain = fast < len(z)
        if back is None:
            back = torch.empty_like(r)
        if len(slots) < self.memory:
            slots = (*slots, torch.empty_like(r))
        following, (_, theirs) = kernel.automatic(z, fz, r, numbers, back, slots)
        if theirs:
            held = kernel.held(numbers[: len(z)], self.watch.newton)
            following, newton = self._newton(problem, z, fz, r, following, held, newton)
        else:
            newton = None  # all rows would begin anew there
        return following, _Rows(kernel, numbers, slots, back, newton, some_plain)

    def _newton(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, following: Tensor, held: Tensor, newton: Any
    ) -> tuple[Tensor, Any]:
        """The next iterates with those of Newton's method in the rows that it has; the others begin there."""
        method = self.newton
        going, newton = method.step(problem, z, fz, r, method.init(z) if newton is None else newton)
        return torch.where(held[:, None], going, following), method.enter(newton, ~held)

    def keep(self, state: _Rows, rows: Tensor) -> _Rows:
        own = [state.numbers, *state.slots, *([] if state.back is None else [state.back])]
        numbers, *vectors = kernels.shrunk(own, rows)
        back = None if state.back is None else vectors.pop()
        return state._replace(
            numbers=numbers, slots=tuple(vectors), back=back, newton=take(state.newton, rows)
        )
