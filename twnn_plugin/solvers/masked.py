"""The loop of step solvers with every decision on the device, for accelerators.

Whether a row goes on is a mask, never a question that the host asks; a finished row is frozen. The host
looks once in ``Control.check_every`` evaluations, to learn whether any row is left and to shrink the
batch, by halves, so that the shapes that occur are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..trees import take
from ..types import Status
from .base import Control, Outcome, Problem, StepSolver, check_place
from .book import GROWTH, PATIENCE, joint_limit, stagnated
from .measure import Threshold, classify, measure, report_residual
from .memory import device_only

__all__ = ["Carry", "Runner", "bucket", "drive_masked", "run_eagerly"]


class Carry(NamedTuple):
    """What goes from one evaluation to the next, for the b rows that are present."""

    z: Tensor  # (b, D) the iterate; of a finished row, its value
    alive: Tensor  # (b,) bool: not finished
    steps: Tensor  # (b,) evaluations while alive
    measured: Tensor  # (3, b) change, size and bound, last measured while alive
    stalled: Tensor  # (b,) bool: finished by stagnation
    over: Tensor  # (b,) bool: the last change was beyond the limit
    limit: Tensor | None  # (b,) changes from which on a row has diverged; None before the first
    earlier: Tensor | None  # (b,) change when stagnation was last looked for
    state: Any  # the solver's own


Body = Callable[[Carry], Carry]


class Runner(Protocol):
    """How a few masked evaluations are executed."""

    def __call__(self, body: Body, carry: Carry, phase: tuple[Any, ...], problem: Problem) -> Carry:
        """``body(carry)``.

        Args:
            body: the evaluations; given the same phase it does the same with tensors.
            carry: its argument, which nobody uses again.
            phase: everything that distinguishes the body from others of this solve.
            problem: its ``evaluations`` are counted on.
        """
        ...


def run_eagerly(body: Body, carry: Carry, phase: tuple[Any, ...], problem: Problem) -> Carry:
    """Call the body."""
    return body(carry)


@dataclass(frozen=True)
class _Steps:
    """``count`` masked evaluations after ``done`` ones."""

    solver: StepSolver
    problem: Problem
    control: Control
    threshold: Threshold
    done: int
    count: int

    def phase(self) -> tuple[Any, ...]:
        due = tuple(k % PATIENCE == 0 for k in self.numbers())
        return (due, self.done + self.count == self.control.max_iter, self.problem.size)

    def numbers(self) -> range:
        return range(self.done + 1, self.done + self.count + 1)

    def __call__(self, carry: Carry) -> Carry:
        for k in self.numbers():
            carry = self.step(k, carry)
        return carry

    def step(self, k: int, carry: Carry) -> Carry:
        z, alive = carry.z, carry.alive
        fz = self.problem.evaluate(z)
        if k == 1:
            check_place(fz, z)
        r = fz - z
        seen = r if self.control.seen is None else fz - self.control.seen.rounded(z)
        change, size = measure(seen.detach(), fz.detach(), self.control.norm, self.control.parts)
        bound = self.threshold(size)
        limit = carry.limit
        if limit is None:
            limit = GROWTH * (change + size)
            if self.control.coupled:
                limit = joint_limit(limit).contiguous()
        low = change < limit  # false for NaN
        over = (change < math.inf) ^ low
        going_on = (change > bound) & (low | (over > carry.over))  # twice over is divergence
        stalled, earlier = carry.stalled, carry.earlier
        if k % PATIENCE == 0:
            if earlier is not None:
                now = stagnated(change, earlier, size, self.control.coarse)
                stalled = stalled | (now & alive)
                going_on = going_on & ~now
            earlier = change
        if self.control.coupled:
            going_on = going_on | ((change <= bound) & (going_on & alive).any())
        going_on = going_on & alive
        broken = alive & ~torch.isfinite(change + bound)  # their value is what f returned
        state = carry.state
        if k == self.control.max_iter:
            following = fz
        else:
            following, state = self.solver.step(self.problem, z, fz, r, state)
        ended = torch.where(broken[:, None], fz, z)
        return Carry(
            torch.where(going_on[:, None], following, ended),
            going_on,
            carry.steps + alive,
            torch.where(alive, torch.stack((change, size, bound.expand_as(change))), carry.measured),
            stalled,
            over,
            limit,
            earlier,
            state,
        )


def drive_masked(
    solver: StepSolver,
    problem: Problem,
    z: Tensor,
    control: Control,
    every: int,
    run: Runner = run_eagerly,
) -> Outcome:
    """As :func:`~twnn_plugin.solvers.driver.drive`, with one host synchronisation in ``every`` evaluations.

    The outcome is the same to rounding. Rows are evaluated until the next look at most, and until the
    batch shrinks.
    """
    if control.scale is not None and control.scale.requires_grad:
        control = replace(control, scale=control.scale.detach())
    batch, asked = z.shape[0], control
    rows = torch.arange(batch, device=z.device)
    threshold = Threshold(control, z)
    carry, ledger, done = _start(solver, z), None, 0
    while True:
        steps = _Steps(solver, problem, control, threshold, done, min(every, control.max_iter - done))
        with device_only():
            carry = run(steps, carry, steps.phase(), problem)
        done += steps.count
        unfinished = int(carry.alive.sum())  # the one synchronisation
        if unfinished == 0 or done == control.max_iter:
            break
        size = bucket(unfinished, batch)
        if problem.can_leave and not control.coupled and size <= problem.leave_share * problem.size:
            ledger = _enter(ledger, rows, carry)
            # All unfinished rows; finished ones fill the places that are left.
            keep = torch.argsort((~carry.alive).to(torch.uint8), stable=True)[:size].sort().values
            measured, own = carry.measured, solver.keep(carry.state, keep)
            carry = take(carry._replace(measured=measured.T, state=None), keep)
            carry = carry._replace(measured=carry.measured.T.contiguous(), state=own)
            rows = rows.index_select(0, keep)
            problem.keep(keep)
            if control.scale is not None:
                control = replace(control, scale=control.scale.index_select(0, keep))
                threshold = Threshold(control, z)
    return _outcome(_enter(ledger, rows, carry), asked)


def bucket(rows: int, batch: int) -> int:
    """The smallest of ``batch``, half of it, a quarter of it, ... (rounded up) that holds ``rows``."""
    size = batch
    while size > 1 and (size + 1) // 2 >= rows:
        size = (size + 1) // 2
    return size


def _start(solver: StepSolver, z: Tensor) -> Carry:
    batch, device = z.shape[0], z.device
    no = torch.zeros(batch, dtype=torch.bool, device=device)
    steps = torch.zeros(batch, dtype=torch.long, device=device)
    measured = torch.zeros(3, batch, dtype=z.dtype, device=device)
    return Carry(z, ~no, steps, measured, no, no, None, None, solver.init(z))


class _Ledger(NamedTuple):
    """What is known of all rows of the batch, in its order."""

    z: Tensor  # (B, D)
    alive: Tensor  # (B,)
    steps: Tensor  # (B,)
    measured: Tensor  # (3, B)
    stalled: Tensor  # (B,)


def _enter(ledger: _Ledger | None, rows: Tensor, carry: Carry) -> _Ledger:
    """The ledger with what is known of the present rows now."""
    if ledger is None:  # all are present, in order
        return _Ledger(carry.z, carry.alive, carry.steps, carry.measured, carry.stalled)
    return _Ledger(
        ledger.z.index_copy(0, rows, carry.z),
        ledger.alive.index_copy(0, rows, carry.alive),
        ledger.steps.index_copy(0, rows, carry.steps),
        ledger.measured.index_copy(1, rows, carry.measured),
        ledger.stalled.index_copy(0, rows, carry.stalled),
    )


def _outcome(ledger: _Ledger, control: Control) -> Outcome:
    change, size, bound = ledger.measured.unbind()
    status = classify(change, bound)
    stalled = ledger.stalled & (status == int(Status.diverged))
    status = torch.where(stalled, int(Status.stagnated), status)
    status = torch.where(ledger.alive, int(Status.max_iter), status)
    return Outcome(ledger.z, status, ledger.steps, report_residual(change, size, control))
