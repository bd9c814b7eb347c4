"""Anderson acceleration by orthogonalised differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import OptionError
from .anderson_rows import AndersonRows, Settings
from .base import Problem, StepSolver, check_whole, is_number
from .memory import difference, free_to_look, free_to_write, to_unit
from .units import units_of_parts

__all__ = ["Anderson"]

_RESTART = 1e2  # growth of ||r|| over its best that discards a row's history
_NOISE = 16.0  # a new direction shorter than this many ulps of the residual is rounding, and dropped
_BLUR = 4.0  # or than this many ulps of the state, whose rounding is in every residual


class _Slot(NamedTuple):
    """One difference that is kept."""

    q: Tensor  # (b, D) the residual difference in units, orthonormal to the others'
    p: Tensor  # (b, D) the difference of f that goes with it
    gamma: Tensor  # (b,) the component of the last residual along q
    weight: Tensor | None  # (b,) 1, or 0 in rows that started anew since; None: no row did


@dataclass(frozen=True)
class _Constants:
    """Tensors of no dimension: operations with Python numbers cost more than the arithmetic."""

    restart: Tensor = field(repr=False, compare=False)  # to be shown or compared, they would be waited for
    noise: Tensor = field(repr=False, compare=False)

    @staticmethod
    def like(z: Tensor) -> _Constants:
        noise = _NOISE * torch.finfo(z.dtype).eps
        return _Constants(z.new_full((), _RESTART), z.new_full((), noise))


class _Ages(NamedTuple):
    """Rows that began at different times."""

    steps: Tensor  # (b,) that each row has made
    settling: int  # steps until the youngest is like the others


class _History(NamedTuple):
    constants: _Constants
    step: int  # counted up to the first accelerated step
    fz: Tensor | None  # (b, D) the last f(z)
    r: Tensor | None  # (b, D) the last residual, in units
    best: Tensor | None  # (b,) the smallest ||r|| so far
    blur: Tensor | None  # (b,) what rounding of the state makes of a difference of residuals
    slots: tuple[_Slot, ...]  # oldest first
    units: Tensor | None = None  # (b, D) what residuals are multiples of; None: of 1
    ages: _Ages | None = None  # None: all rows are past their first accelerated step, or made ``step`` steps


@dataclass(frozen=True)
class Anderson(StepSolver):
    """Anderson acceleration (type II), orthogonalised, with every row on its own.

    Minimises ``||r||`` over the span of the newest ``memory`` differences (Anderson 1965; Walker &
    Ni 2011). The differences are kept orthonormal by modified Gram-Schmidt, so that no system is
    solved, nothing is regularised by an absolute number, and any scale of ``z`` works. Dropping
    the oldest of an orthonormal set leaves valid secant pairs.

    Args:
        memory: differences kept, >= 1; each is two vectors of the size of the state. More than 3 pays where
            the Jacobian is far from symmetric and ``f`` expensive. Never more than half the state's size.
        damping: in (0, 1], the share of the residual that is added.
        start: plain steps before the first accelerated one, >= 0; easy rows are done by then.
    """

    memory: int = 3
    damping: float = 1.0
    start: int = 3

    def __post_init__(self) -> None:
        check_whole("anderson", "memory", self.memory)
        check_whole("anderson", "start", self.start, least=0)
        if not is_number(self.damping) or not 0 < self.damping <= 1:
            raise OptionError(f"Option damping of solver 'anderson' must be in (0, 1]; got {self.damping!r}.")

    def in_parts(self, parts: tuple[int, ...]) -> Anderson:
        return _OfParts(self.memory, self.damping, self.start, parts)

    def compiled(self) -> StepSolver:
        # A subclass may do something else in a step.
        return self._compiled(()) if type(self) is Anderson else self

    def _compiled(self, parts: tuple[int, ...]) -> StepSolver:
        if self.memory > kernels.SLOTS:
            return self
        return AndersonRows(
            Settings(self.memory, self.damping, self.start, _RESTART, _NOISE, _BLUR, parts),
        )

    def units(self, fz: Tensor) -> Tensor | None:
        """(b, D) what the residuals are taken as multiples of, from values of ``f``; None: they are as is."""
        return None

    def init(self, z: Tensor) -> _History:
        return _History(_Constants.like(z.detach()), 0, None, None, None, None, ())

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: _History
    ) -> tuple[Tensor, _History]:
        plain = fz if self.damping == 1 else torch.add(z, r, alpha=self.damping)
        if state.ages is not None:
            return self._step_of_ages(plain, fz, r, state, state.ages)
        if state.step < self.start:
            newest = state.step + 1 == self.start  # the first difference needs only the last pair
            units = self.units(fz) if newest else None
            pair = (fz, _per_unit(r, units)) if newest else (None, None)
            return plain, _History(state.constants, state.step + 1, *pair, None, None, (), units)
        units = self.units(fz) if state.r is None else state.units
        r = _per_unit(r, units)
        norm = torch.linalg.vector_norm(r, dim=1)
        blur = state.blur
        if blur is None:
            size = torch.linalg.vector_norm(_per_unit(fz.detach(), units), dim=1)
            blur = size * (_BLUR * torch.finfo(fz.dtype).eps)
        if state.r is None:  # start=0: nothing to take a difference with yet
            return plain, _History(state.constants, state.step, fz, r, norm, blur, (), units)
        best = norm if state.best is None else torch.minimum(norm, state.best)
        slots = self._extend(state, fz, r, norm, best, blur)
        z_next = self._corrected(plain, slots, units, free_to_write(r))
        return z_next, _History(state.constants, state.step, fz, r, best, blur, slots, units)

    def _corrected(self, plain: Tensor, slots: tuple[_Slot, ...], units: Tensor | None, own: bool) -> Tensor:
        """The plain step without what the history knows of it."""
        z_next = plain
        for slot in slots:
            z_next = _subtract(z_next, slot.p, slot.gamma, own and z_next is not plain)
            if self.damping != 1:  # p holds differences of f; damping takes its share of q's back
                q = slot.q if units is None else slot.q * units
                z_next = torch.addcmul(z_next, q, slot.gamma[:, None], value=1 - self.damping)
        return z_next

    def renew(self, state: _History, rows: Tensor, z: Tensor) -> _History:
        """A history of zeros does nothing, so that rows of any age are stepped as one."""
        best, blur, ages = state.best, state.blur, state.ages
        if ages is None:
            made = state.step if best is None else self.start + 1
            steps = rows.new_full((len(z),), made)
        else:
            steps = ages.steps
        return _History(
            state.constants,
            self.start,
            # Not written to: f may have returned what is somebody else's.
            torch.zeros_like(z) if state.fz is None else state.fz.index_fill(0, rows, 0),
            torch.zeros_like(z) if state.r is None else _zeroed(state.r, rows),
            z.new_full((len(z),), math.inf) if best is None else best.index_fill(0, rows, math.inf),
            z.new_zeros(len(z)) if blur is None else blur,
            tuple(
                _Slot(_zeroed(slot.q, rows), _zeroed(slot.p, rows), _zeroed(slot.gamma, rows), slot.weight)
                for slot in state.slots
            ),
            None if state.units is None else state.units.index_fill(0, rows, 1),
            _Ages(steps.index_fill(0, rows, 0), self.start + 1),
        )

    def _step_of_ages(
        self, plain: Tensor, fz: Tensor, r: Tensor, state: _History, ages: _Ages
    ) -> tuple[Tensor, _History]:
        """A step in which every row does what it would do at its age among rows of that age."""
        assert state.best is not None and state.blur is not None
        made = ages.steps
        units = self.units(fz)
        if units is not None and state.units is not None:
            units = torch.where((made == max(self.start - 1, 0))[:, None], units, state.units)
        r = _per_unit(r, units)
        norm = torch.linalg.vector_norm(r, dim=1)
        size = torch.linalg.vector_norm(_per_unit(fz.detach(), units), dim=1)
        blur = torch.where(made == self.start, size * (_BLUR * torch.finfo(fz.dtype).eps), state.blur)
        best = torch.where(made >= self.start, torch.minimum(norm, state.best), math.inf)
        slots = self._extend(state, fz, r, norm, best, blur, mature=made >= max(self.start, 1))
        settling = ages.settling - 1
        older = _Ages(made + 1, settling) if settling else None
        state = _History(state.constants, state.step, fz, r, best, blur, slots, units, older)
        return self._corrected(plain, slots, units, free_to_write(r)), state

    def _extend(
        self,
        state: _History,
        fz: Tensor,
        r: Tensor,
        norm: Tensor,
        best: Tensor,
        blur: Tensor,
        mature: Tensor | None = None,
    ) -> tuple[_Slot, ...]:
        """The history with the newest difference in it; rows whose residual has grown lose theirs.

        They lose it by weights on (b,) vectors: no vector of the history is written again, and the
        host need not know whether any row is concerned. Memory that nothing needs any more is written
        to: that of the last residual, and of a vector that leaves the history.

        Rows that are not mature, (b,) bool, get a difference of zeros.
        """
        assert state.r is not None and state.fz is not None
        # Differences that span the whole space leave no residual, and say nothing of curvature.
        full = len(state.slots) >= min(self.memory, max(1, r.shape[1] // 2))
        own = free_to_write(r)
        dr = difference(r, state.r, state.r if own else None)
        df = difference(fz, state.fz, state.slots[0].p if own and full else None)
        sound = norm <= best * state.constants.restart
        # On the CPU a look costs less than the weights; they are made when a row needs them.
        keep = None if own and free_to_look(r) and bool(sound.all()) else sound.to(r.dtype)
        slots = []
        for q, p, gamma, weight in state.slots[full:]:
            h = torch.linalg.vecdot(q, dr)
            if keep is not None:
                weight = keep if weight is None else weight * keep
                gamma = gamma * keep
            if weight is not None:
                h = h * weight
            dr, df = _subtract(dr, q, h, own), _subtract(df, p, h, own)
            # q.r from q.(last r), which is known, and q.dr
            slots.append(_Slot(q, p, gamma + h, weight))
        if not own:
            norm = norm.detach()
        rest = torch.linalg.vector_norm(dr if own else dr.detach(), dim=1)
        usable = sound & (rest > torch.addcmul(blur, norm, state.constants.noise))
        if mature is not None:
            usable = usable & mature
        if own:
            inverse = (usable / torch.where(usable, rest, 1.0))[:, None]
            q, p = dr.mul_(inverse), df.mul_(inverse)
        else:
            size = to_unit(dr, rest, usable)[:, None]
            q, p = dr * size, df * size
        return (*slots, _Slot(q, p, torch.linalg.vecdot(q, r), keep))


@dataclass(frozen=True)
class _OfParts(Anderson):
    """:class:`Anderson` for states of several parts: inner products weigh each part by its size.

    Over the plain row the part with the largest numbers would decide alone. If it has few entries, the others
    are left to directions that hardly differ in it: many more steps, and a derivative of them that has
    nothing to do with the solution's.

    The units are those of ``f(z)`` before the first acceleration, row by row.

    Args:
        memory: as for :class:`Anderson`.
        damping: as for :class:`Anderson`.
        start: as for :class:`Anderson`.
        parts: their widths.
    """

    parts: tuple[int, ...] = ()

    def compiled(self) -> StepSolver:
        return self._compiled(self.parts)

    def units(self, fz: Tensor) -> Tensor:
        return units_of_parts(fz, self.parts)


def _per_unit(x: Tensor, units: Tensor | None) -> Tensor:
    return x if units is None else x / units


def _zeroed(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` with zeros in some rows, in place where nothing is recorded."""
    return x.index_fill_(0, rows, 0) if free_to_write(x) else x.index_fill(0, rows, 0)


def _subtract(x: Tensor, direction: Tensor, length: Tensor, own: bool) -> Tensor:
    """``x - length * direction`` row by row, in place if ``own``."""
    if own:
        return x.addcmul_(direction, length[:, None], value=-1)
    return torch.addcmul(x, direction, length[:, None], value=-1)
