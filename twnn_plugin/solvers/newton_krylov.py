"""Newton's method with the linear equations solved inexactly by Krylov directions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from .axpy import add_scaled_
from .base import Control, Outcome, Problem, StepSolver, WholeSolver, check_whole, is_number
from .driver import drive_rows
from .measure import measure, threshold
from .memory import to_unit
from .precision import TENSOR_FLOAT, cut_short
from .units import InUnits

__all__ = ["Newton", "NewtonKrylov", "NewtonSteps"]

_PROBE, _TRIAL, _PLAIN = 0, 1, 2  # what a row has f evaluated at
_DECREASE = 1e-4  # a step must take at least this share of the promised decrease out of ||r||
_BACKTRACKS = 8  # shortened steps before a plain one is made instead
_DEPENDENT = 1e-6  # a direction that lies in the span of the others to this share ends the inner solve
_STALLED = 1e-2  # a direction that takes less than this share out of the inner residual says little


class Newton(NamedTuple):
    """The state of :class:`NewtonSteps`: every row is at a stage of its own."""

    scale: Tensor | None  # (b,) Control.scale
    z: Tensor  # (b, D) the Newton iterate
    r: Tensor  # (b, D) f(z) - z
    size: Tensor  # (b,) ||r||
    stage: Tensor  # (b,) int: what f is evaluated at now
    h: Tensor  # (b,) length of the difference along the direction
    eta: Tensor  # (b,) forcing term: the inner residual aimed at, relative to ||r||
    reached: Tensor  # (b,) the inner residual reached, relative to ||r||
    age: Tensor  # (b,) int: directions taken, or, at a trial, steps refused
    plain: Tensor  # (b,) int: plain steps still to be made before the first Newton step
    turn: Tensor  # (b,) int: iterates from which a step was refused
    eps: Tensor  # (b,) relative rounding error of f at the iterate
    d: Tensor  # (b, D) the step so far
    s: Tensor  # (b, D) inner residual r - (I - J) d
    v: Tensor  # (b, D) the next direction
    q: tuple[Tensor, ...]  # (b, D) each: orthonormal (I - J) p
    p: tuple[Tensor, ...]  # (b, D) each
    live: Tensor  # (b, m) 1 for the pairs of the present Newton step, 0 for those of earlier ones


@dataclass(frozen=True)
class NewtonKrylov(WholeSolver):
    """Inexact Newton on ``f(z) - z = 0``, with every row at its own stage of it.

    The step solves ``(I - J) d = f(z) - z`` by GCR to a relative residual chosen after Eisenstat &
    Walker (1996, choice 2), no tighter than the tolerance asks for (Kelley 1995, section 6.3); products
    with J are differences of ``f`` (Knoll & Keyes 2004, section 2). A step that does not shorten the
    residual is not taken: a plain one is made instead, or, every second time, it is shortened
    (Eisenstat & Walker 1994) until it does. Every evaluation counts as a step, those along Krylov
    directions too, and a state met on the way that is within the tolerance ends the row. When gradients are
    recorded the differences are recorded with them.

    Few evaluations where the Jacobian has complex pairs near or beyond the unit circle; elsewhere more
    than ``anderson`` needs, and on a front, whose Jacobian is nilpotent, far more.

    Args:
        memory: Krylov directions of one Newton step at most, >= 1; each is two (B, D) matrices.
        forcing: in (0, 1), the relative residual of the first inner solve and the loosest of any.
        start: plain steps before the first Newton step, >= 0: where the search begins, the Jacobian may say
            nothing about the solution (a normalisation of a state that is zero).
    """

    memory: int = 20
    forcing: float = 0.5
    start: int = 3

    def __post_init__(self) -> None:
        check_whole("newton_krylov", "memory", self.memory)
        check_whole("newton_krylov", "start", self.start, least=0)
        if not is_number(self.forcing) or not 0 < self.forcing < 1:
            raise OptionError(
                f"Option forcing of solver 'newton_krylov' must be in (0, 1); got {self.forcing!r}."
            )

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        return drive_rows(lambda control: NewtonSteps(self, control), problem, z, control)


@dataclass(frozen=True)
class NewtonSteps(StepSolver):
    """The evaluations that the method asks for, as the driver makes them."""

    method: NewtonKrylov
    control: Control

    def in_parts(self, parts: tuple[int, ...]) -> StepSolver:
        # The plain steps are made there, as many.
        return InUnits(replace(self, method=replace(self.method, start=0)), parts, self.method.start)

    def init(self, z: Tensor) -> Newton:
        nothing = z.new_zeros(z.shape[0])
        return Newton(
            self.control.scale,
            z,
            torch.zeros_like(z),
            torch.full_like(nothing, math.inf),
            torch.full_like(nothing, _PLAIN, dtype=torch.long),
            nothing,
            torch.full_like(nothing, self.method.forcing),
            torch.ones_like(nothing),
            torch.zeros_like(nothing, dtype=torch.long),
            torch.full_like(nothing, self.method.start, dtype=torch.long),
            torch.zeros_like(nothing, dtype=torch.long),
            nothing,
            torch.zeros_like(z),
            torch.zeros_like(z),
            torch.zeros_like(z),
            (),
            (),
            z.new_zeros(z.shape[0], 0),
        )

    def enter(self, state: Newton, rows: Tensor) -> Newton:
        """The state with the rows of a (b,) mask as at the start: where they are next, they begin."""
        return state._replace(
            size=torch.where(rows, math.inf, state.size),
            stage=torch.where(rows, _PLAIN, state.stage),
            plain=torch.where(rows, self.method.start, state.plain),
        )

    def step(
        self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Newton
    ) -> tuple[Tensor, Newton]:
        size = torch.linalg.vector_norm(r.detach(), dim=1)
        probing, trying = state.stage == _PROBE, state.stage == _TRIAL
        promised = 1 - _DECREASE * (1 - state.reached)
        good = ~trying | (size <= promised * state.size)
        arrived, refused = ~probing & good, trying & ~good
        state = self._extend(state, z, r, probing)
        state = _shorten(state, size, refused)
        # Of the products of a linear equation the rounding error is known: they do not show it in any units.
        coarse = max(self.control.coarse, getattr(problem, "eps", 0.0))
        state = state._replace(eps=torch.where(arrived, _rounding(fz.detach(), coarse), state.eps))
        state = self._move(state, z, fz, r, size, arrived)
        return self._next(state)

    def _extend(self, state: Newton, z: Tensor, r: Tensor, probing: Tensor) -> Newton:
        """Take in the product along a direction: one step of GCR."""
        cut = -(self.method.memory - 1) or len(state.q)
        q_old, p_old, live = state.q[cut:], state.p[cut:], state.live[:, cut:]
        # An exact secant pair, whatever rounding made of the step h.
        apart = probing & (state.h > 0)  # not so where state and f's value are zero: nothing can be learnt
        inverse = (apart / torch.where(apart, state.h, 1.0))[:, None]
        p, q = (z - state.z) * inverse, (state.r - r) * inverse
        length = torch.linalg.vector_norm(q.detach(), dim=1)
        for q_j, p_j, live_j in zip(q_old, p_old, live.unbind(1), strict=True):
            share = -torch.linalg.vecdot(q_j, q) * live_j
            q, p = add_scaled_(q, q_j, share), add_scaled_(p, p_j, share)
        rest = torch.linalg.vector_norm(q.detach(), dim=1)
        usable = apart & (rest > _DEPENDENT * length)
        size = to_unit(q, rest, usable)[:, None]
        q, p = q * size, p * size
        alpha = torch.linalg.vecdot(q, state.s)
        s = torch.addcmul(state.s, q, alpha[:, None], value=-1)
        d = torch.addcmul(state.d, p, alpha[:, None])
        safe = torch.where(state.size > 0, state.size, 1.0)
        reached = torch.linalg.vector_norm(s.detach(), dim=1) / safe
        # After a stalled step the residual gives the same direction again; the newest product does not.
        stalled = usable & (alpha.abs() <= _STALLED * state.reached * safe)
        age = torch.where(probing, state.age + 1, state.age)
        full = (reached <= state.eta) | (age >= self.method.memory) | ~usable
        # A step that goes nowhere is no trial: all directions were useless.
        after = torch.where(reached < 1 - _DECREASE, _TRIAL, _PLAIN)
        return state._replace(
            stage=torch.where(probing & full, after, state.stage),
            reached=torch.where(probing, reached, state.reached),
            age=torch.where(probing & full, 0, age),
            s=s,
            d=d,
            v=torch.where(stalled[:, None], q, s),
            q=(*q_old, q),
            p=(*p_old, p),
            live=torch.nn.functional.pad(live, (0, 1), value=1.0),
        )

    def _move(self, state: Newton, z: Tensor, fz: Tensor, r: Tensor, size: Tensor, arrived: Tensor) -> Newton:
        """Rows that arrived at a new iterate start anew from there."""
        method, column = self.method, arrived[:, None]
        first = torch.isinf(state.size)
        ratio = size / torch.where(first | (state.size == 0), size, state.size)
        eta = 0.9 * ratio**2
        floor = 0.9 * state.eta**2  # it must not fall faster than the method converges
        eta = torch.where(floor > 0.1, torch.maximum(eta, floor), eta)
        eta = torch.where(first, method.forcing, eta)
        control = replace(self.control, scale=state.scale)
        change, magnitude = measure(r.detach(), fz.detach(), control.norm, control.parts)
        enough = 0.5 * threshold(magnitude, control) / torch.where(change > 0, change, 1.0)
        eta = torch.maximum(torch.maximum(eta, enough), 4 * state.eps.sqrt()).clamp(max=method.forcing)
        return state._replace(
            z=torch.where(column, z, state.z),
            r=torch.where(column, r, state.r),
            size=torch.where(arrived, size, state.size),
            stage=torch.where(arrived, torch.where(state.plain > 0, _PLAIN, _PROBE), state.stage),
            plain=torch.where(arrived, (state.plain - 1).clamp_min(0), state.plain),
            eta=torch.where(arrived, eta, state.eta),
            reached=torch.where(arrived, 1.0, state.reached),
            age=torch.where(arrived, 0, state.age),
            d=torch.where(column, 0.0, state.d),
            s=torch.where(column, r, state.s),
            v=torch.where(column, r, state.v),
            live=torch.where(column, 0.0, state.live),
        )

    def _next(self, state: Newton) -> tuple[Tensor, Newton]:
        """Where each row has ``f`` evaluated next."""
        length = torch.linalg.vector_norm(state.v.detach(), dim=1)
        around = torch.linalg.vector_norm(state.z.detach(), dim=1)
        around = torch.maximum(around, torch.linalg.vector_norm((state.z + state.r).detach(), dim=1))
        h = state.eps.sqrt() * around / torch.where(length > 0, length, 1.0)
        probing, trying = (state.stage == _PROBE)[:, None], (state.stage == _TRIAL)[:, None]
        move = torch.where(trying, state.d, state.r)
        move = torch.where(probing, h[:, None] * state.v, move)
        return state.z + move, state._replace(h=h)


def _shorten(state: Newton, size: Tensor, refused: Tensor) -> Newton:
    """Shorten the step of rows that it did not serve, by a parabola through what was measured."""
    ratio = size / torch.where(state.size > 0, state.size, 1.0)
    slope = 1 - state.reached
    curve = (ratio**2 - 1 + 2 * slope).clamp_min(torch.finfo(size.dtype).tiny)
    theta = (slope / curve).clamp(0.1, 0.5)
    age = torch.where(refused, state.age + 1, state.age)
    turn = torch.where(refused & (age == 1), state.turn + 1, state.turn)
    plain = refused & ((turn % 2 == 1) | (age >= _BACKTRACKS))
    return state._replace(
        stage=torch.where(plain, _PLAIN, state.stage),
        turn=turn,
        reached=torch.where(refused, 1 - theta * slope, state.reached),
        age=age,
        d=torch.where(refused[:, None], theta[:, None] * state.d, state.d),
    )


def _rounding(fz: Tensor, coarse: float) -> Tensor:
    """(b,) relative rounding error of ``f``, read off its values: lower precision shows in them.

    A difference must stand out from the rounding of every part of the state, so the coarsest counts.

    Args:
        fz: (b, D) values of ``f``.
        coarse: the rounding error that is known of; 0: none is.
    """
    if cut_short(fz.device, (fz.dtype,)):
        coarse = max(coarse, TENSOR_FLOAT)
    out = fz.new_full((fz.shape[0],), max(torch.finfo(fz.dtype).eps, coarse))
    fits = {dtype: fz.to(dtype).to(fz.dtype) == fz for dtype in (torch.float16, torch.bfloat16)}
    if fz.dtype is torch.float64:
        # Parts in float32 lie beside others, and of which width is not known here. A number that needs the
        # digits of float32 and no more tells of them; zeros, ones and such need fewer, and tell nothing.
        single = (fz.float().double() == fz) & ~fits[torch.bfloat16]
        out = torch.where(single.any(dim=1), out.clamp_min(torch.finfo(torch.float32).eps), out)
    for dtype, fit in fits.items():
        out = torch.where(fit.all(dim=1), out.clamp_min(torch.finfo(dtype).eps), out)
    return out
