"""Linear equations whose unknown has parts, each of which is to be as right as the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..solvers import Outcome
from ..types import Status
from .linear import ULPS, LinearSettings, Products, solve_linear

__all__ = ["solve_by_parts"]

_ROUNDS = 3


def solve_by_parts(
    make: Callable[[], Products],
    settings: LinearSettings,
    sizes: Sequence[int],
    guess: Tensor | None = None,
) -> tuple[Outcome, int]:
    """Solve ``u = A u + g`` until every part of u meets the tolerance, relative to itself.

    The norm over all parts bounds what a small part is off by in terms of the large ones, while the gradient
    of weights that act on the small part alone is proportional to that part.

    Args:
        make: the equation, of all rows, in units in which its parts can be added up; called once for each
            attempt.
        settings: the solver and when it stops.
        sizes: widths of the parts.
        guess: see :func:`~twnn_plugin.adjoints.linear.solve_linear`.

    Returns:
        The outcome, and rows evaluated.
    """
    problem = make()
    g = problem.g
    solved = solve_linear(problem, settings, guess)
    spent = problem.evaluations
    if len(sizes) == 1 or not g.numel():
        return solved, spent
    scale, noise = torch.linalg.vector_norm(g, dim=1), ULPS * torch.finfo(g.dtype).eps / settings.tol
    for _ in range(_ROUNDS):
        own = _norms(solved.value, sizes)
        largest = own.amax(dim=1, keepdim=True)
        # Shares whose ratio cannot be squared are nothing that a norm could see.
        asked = (own > torch.finfo(g.dtype).tiny ** 0.5 * largest) & (largest > 0)
        asked &= (solved.status == int(Status.converged))[:, None]
        at_most = (solved.residual * scale)[:, None]  # of all parts, and so of each
        if not settings.coupled and not bool((asked & (at_most > settings.tol * own)).any()):
            break
        problem = make()
        apart = problem.evaluate(solved.value) - solved.value
        rest = _norms(apart, sizes)
        spent += problem.evaluations
        missed = asked & (rest > settings.tol * own)
        if not bool(missed.any()):
            break
        # A part that rounding in the largest drowns is solved for in units in which it is as large.
        drowned = asked & (own <= noise * largest)
        units = _spread(torch.where(drowned, largest / own, 1.0), sizes)
        problem = make().in_units(units)
        size = torch.linalg.vector_norm(problem.g, dim=1)
        wanted = settings.tol * torch.where(drowned, largest, own) / size[:, None]
        # Not of rows whose cotangent has no norm, or is NaN: nobody could meet what that asks of all.
        wanted = torch.where(missed & (wanted > 0), wanted, torch.inf).amin()
        tighter = replace(settings, tol=float(wanted.clamp(max=settings.tol / 2)))
        better = solve_linear(problem, tighter, units * solved.value)
        spent += problem.evaluations
        worse = _worse(better, size, torch.linalg.vector_norm(units * apart, dim=1), settings.coupled)
        better = replace(better, value=better.value / units)
        # That no more can be known of a part that is drowned is no failure.
        solved = _joined(solved, better, (missed & ~drowned).any(dim=1), worse)
    return solved, spent


def _spread(each: Tensor, sizes: Sequence[int]) -> Tensor:
    """(b, D) of a number for each part, (b, P)."""
    return each.repeat_interleave(torch.tensor(sizes, device=each.device), dim=1, output_size=sum(sizes))


def _norms(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """(b, P) norms of the parts of (b, D)."""
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in x.split(list(sizes), dim=1)], dim=1)


def _worse(better: Outcome, size: Tensor, before: Tensor, coupled: bool) -> Tensor:
    """(b,) rows that a second attempt failed in, and left farther from a solution than the first one had.

    Args:
        better: the second attempt.
        size: (b,) of its right-hand sides, which its residuals are relative to.
        before: (b,) the residuals that it began with.
        coupled: whether the rows are one system, of which all or nothing is taken.
    """
    failed, after = better.status != int(Status.converged), better.residual * size
    gone = (better.status == int(Status.diverged)) | (better.status == int(Status.non_finite))
    if not coupled:
        return gone | (failed & ~(after <= before))
    total = torch.linalg.vector_norm
    after = better.residual * (total(size) / size.numel() ** 0.5)  # relative to what rows have on average
    return (gone.any() | (failed.any() & ~(total(after) <= total(before)))).expand_as(failed)


def _joined(solved: Outcome, better: Outcome, missed: Tensor, worse: Tensor) -> Outcome:
    """The second attempt, where it is no worse, with all products; rows that had met the rule keep that."""
    return Outcome(
        torch.where(worse[:, None], solved.value, better.value),
        torch.where(missed, better.status, solved.status),
        solved.steps + better.steps + 1,
        torch.where(worse, solved.residual, better.residual),
    )
