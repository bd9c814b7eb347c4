"""Plain steps first, Broyden's method for the rows that are not done soon, Newton's for failures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import OptionError
from .base import Control, Outcome, Problem, StepSolver, WholeSolver
from .driver import drive_rows
from .kelley import Steps
from .kelley_rows import AutoRows, Watch
from .measure import measure, threshold
from .newton_krylov import Newton, NewtonKrylov, NewtonSteps
from .units import InUnits

__all__ = ["Auto"]

_PLAIN, _BROYDEN, _NEWTON = 0, 1, 2  # who has the row
_SOON = 3.0  # evaluations: a row that plain steps finish within so many stays with them
_SINGULAR = 0.05  # an update that lengthens the step by more than the inverse of this is not made
_RESTART = 1e2  # growth of ||r|| over its best that sends a row back to where that was
_TOSSED = 2.0  # ||r|| over its best that shows a method without a grip; a slow front stays below
_PATIENCE = 40  # such evaluations, with the best not halved, after which the row gets another method


class _Auto(NamedTuple):
    scale: Tensor | None  # (b,) Control.scale
    mode: Tensor  # (b,) int
    change: Tensor  # (b,) the last residual as it is measured; infinite at first
    best: Tensor  # (b,) the smallest ||r|| so far
    goal: Tensor  # (b,) what ||r|| must fall to before patience ends
    waited: Tensor  # (b,) int: evaluations without a grip since it last did
    age: Tensor  # (b,) int: Broyden steps since the row's method started
    back: Tensor | None  # (b, D) f at the state with the smallest ||r||, once a row was accelerated
    last: Tensor | None  # (b, D) the last plain step, while there is no other
    steps: Steps | None  # the last steps, once a row was accelerated
    newton: Newton | None  # once a row has Newton's method
    some_plain: bool  # whether any row has plain steps still


@dataclass(frozen=True)
class Auto(WholeSolver):
    """Plain steps, then Broyden's method where they are slow, then Newton-Krylov where that fails.

    Each row decides for itself. From its second evaluation on, the rate at which its residual falls tells
    how many plain steps it still needs; unless these are few, it goes on with Broyden's method, which
    starts from its last plain step (limited-memory form of Kelley 1995, section 7.3: one stored vector a
    step). The updates vanish where a new residual is orthogonal to the past steps, so that a state
    that travels (a front) goes on by plain steps at full speed. A row whose residual grows a hundredfold is
    put back to its best state; one that makes no progress changes over to Newton-Krylov, and back.

    Args:
        memory: steps kept by Broyden's method, >= 1, each a (B, D) matrix; when they are full the
            row starts anew.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise OptionError(
                f"Option memory of solver 'auto' must be a whole number, at least 1; got {self.memory!r}."
            )

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        return drive_rows(lambda control: _Steps(self.memory, control), problem, z, control)


@dataclass(frozen=True)
class _Steps(StepSolver):
    """The evaluations that the methods ask for, as the driver makes them."""

    memory: int
    control: Control

    def in_parts(self, parts: tuple[int, ...]) -> StepSolver:
        return InUnits(self, parts)

    def compiled(self) -> StepSolver:
        if self.memory > kernels.SLOTS:
            return self
        watch = Watch(_NEWTON, _SINGULAR, _RESTART, _TOSSED, _PATIENCE, _SOON)
        return AutoRows(self.memory, watch, self.control, self._method())

    def _method(self) -> NewtonSteps:
        return NewtonSteps(NewtonKrylov(self.memory, start=0), replace(self.control, scale=None))

    def init(self, z: Tensor) -> _Auto:
        zero = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)
        far = z.new_full((z.shape[0],), math.inf)
        return _Auto(self.control.scale, zero, far, far, far, zero, zero, None, None, None, None, True)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _Auto) -> tuple[Tensor, _Auto]:
        if state.some_plain:
            state = self._judge(fz.detach(), r.detach(), state)
        if state.back is None and not bool((state.mode != _PLAIN).any()):
            return fz, state._replace(last=r)
        size = torch.linalg.vector_norm(r.detach(), dim=1)
        step, state, every = self._broyden(r, state)
        z_next = z + step if every else fz + (step - r)  # of plain steps exactly f(z)
        state, lost = self._watch(fz, size, state)
        if state.newton is not None or bool((state.mode == _NEWTON).any()):
            theirs, state = self._newton(problem, z, fz, r, lost, state)
            z_next = torch.where((state.mode == _NEWTON)[:, None], theirs, z_next)
        if lost is None:
            return z_next, state
        assert state.back is not None
        return torch.where(lost[:, None], state.back, z_next), state

    def _judge(self, fz: Tensor, r: Tensor, state: _Auto) -> _Auto:
        """Accelerate the rows that plain steps will not finish soon."""
        control = replace(self.control, scale=state.scale)
        change, magnitude = measure(r, fz, control.norm, control.parts)
        bound = threshold(magnitude, control)
        before = state.change
        # Plain steps still needed: log(change / bound) / log(before / change).
        soon = (change < before) & (change / bound <= (before / change) ** _SOON)
        slow = (state.mode == _PLAIN) & ~soon & torch.isfinite(before)
        mode = torch.where(slow, _BROYDEN, state.mode)
        return state._replace(mode=mode, change=change, some_plain=bool((mode == _PLAIN).any()))

    def _broyden(self, r: Tensor, state: _Auto) -> tuple[Tensor, _Auto, bool]:
        """The step of Broyden's method in its rows, a plain one in the others; whether there are none."""
        steps = state.steps
        if steps is None:  # the first acceleration: the last plain step is the only one
            assert state.last is not None
            steps = Steps.first(state.last)
        steps = steps.last(self.memory)
        v, rest = steps.next(r)
        sound = (rest.detach().abs() > _SINGULAR) & (state.age < self.memory)[:, None]
        if state.some_plain or state.newton is not None:
            sound = sound & (state.mode == _BROYDEN)[:, None]
        every = bool(sound.all())
        if every:
            step, age = v / rest, state.age + 1
            steps = steps.extended(step)
        else:
            # The inner where keeps 1/0 out of the derivative when the solve is unrolled.
            step = torch.where(sound, v / torch.where(sound, rest, 1.0), r)
            age = torch.where(sound[:, 0], state.age + 1, 0)
            steps = steps.extended(step, sound)
        return step, state._replace(last=None, steps=steps, age=age), every

    def _watch(self, fz: Tensor, size: Tensor, state: _Auto) -> tuple[_Auto, Tensor | None]:
        """Rows that are lost go back to their best state, those without progress to another method.

        Returns:
            The state; (b,) bool, the rows that are lost, or None if there are none.
        """
        better = size < state.best
        settled = not state.some_plain and state.newton is None
        if settled and bool(better.all()):  # what most steps are: nothing to worry about
            reached = size <= state.goal
            goal = torch.where(reached, 0.5 * size, state.goal)
            waited = torch.where(reached, 0, state.waited)
            return state._replace(best=size, goal=goal, waited=waited, back=fz), None
        back = fz if state.back is None else torch.where(better[:, None], fz, state.back)
        fast = state.mode != _PLAIN  # for the others nothing is kept: when it began is the batch's affair
        best = torch.where(fast, torch.minimum(size, state.best), math.inf)
        reached = (best <= state.goal) | ~fast
        tossed = (size > _TOSSED * best) | (state.mode == _NEWTON)
        waited = torch.where(reached, 0, state.waited + tossed.long())
        weary = waited >= _PATIENCE
        lost = fast & ((size > _RESTART * best) | weary)
        state = state._replace(
            best=best, goal=torch.where(reached | weary, 0.5 * best, state.goal), waited=waited, back=back
        )
        if not bool(lost.any()):
            return state, None
        assert state.steps is not None
        other = torch.where(state.mode == _NEWTON, _BROYDEN, _NEWTON)
        return state._replace(
            mode=torch.where(weary, other, state.mode),
            waited=torch.where(weary, 0, waited),
            age=torch.where(lost, 0, state.age),
            steps=state.steps.forgotten(~lost[:, None]),
        ), lost

    def _newton(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, lost: Tensor | None, state: _Auto
    ) -> tuple[Tensor, _Auto]:
        """Where Newton's method goes next; rows that it does not have begin when they get it."""
        method = self._method()
        newton = method.init(z) if state.newton is None else state.newton
        z_next, newton = method.step(problem, z, fz, r, newton)
        begin = state.mode != _NEWTON
        newton = method.enter(newton, begin if lost is None else begin | lost)
        return z_next, state._replace(newton=newton)
