"""One solve with its gradient: how right it is, what it did, what it held, how long it took."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..harness import Counts, Stopwatch, counted, peak_bytes
from ..harness.run import reason_of
from .candidates import Candidate, Limits, Solve
from .problems import Problem, flat
from .reference import LADDER, Reference, at_most, gradient_error

__all__ = ["Bench", "Quality"]


@dataclass(frozen=True)
class Quality:
    """What one solve at one tolerance gave.

    Attributes:
        reason: why it raised; empty if it did not.
        gradient_error: against float64, the larger of parameters and input.
        solution_error: worst row's ``||z - z*|| / ||z*||``.
        residual: worst row's true relative residual ``||f(z) - z|| / ||f(z)||``, measured afterwards.
        failed_rows: rows whose true residual exceeds the tolerance, or is not finite.
        rows: rows evaluated, forward and backward (graphs that the backward pass builds included).
        product_rows: vector-Jacobian products, in rows.
        seconds: one run, with the counting.
    """

    reason: str = ""
    gradient_error: float = float("inf")
    solution_error: float = float("inf")
    residual: float = float("inf")
    failed_rows: int = -1
    rows: int = 0
    product_rows: int = 0
    seconds: float = 0.0


class Bench:
    """A problem on a device beside its reference, for candidates to be measured on.

    Args:
        problem: in float64 on the CPU.
        reference: its solution.
        device: where candidates run.
        dtype: of the problem that they see.
        autocast: run the forward pass under bfloat16 autocast.
    """

    def __init__(
        self,
        problem: Problem,
        reference: Reference,
        device: str,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ):
        self.problem = problem.to(dtype, device)
        self.reference, self.device, self.autocast = reference, device, autocast

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if not self.autocast:
            yield
            return
        with torch.autocast(self.device, dtype=torch.bfloat16):
            yield

    def solve(
        self, solve: Solve, f: Callable[..., Any] | None = None, lap: Callable[[str], None] | None = None
    ) -> tuple[Any, list[Tensor]]:
        """Forward and backward once: the state and the gradients of x and the parameters."""
        problem, lap = self.problem, lap or (lambda name: None)
        x = problem.context[0].detach().requires_grad_()
        with self._precision():
            value = solve(f or problem.f, (x, *problem.context[1:]))
        lap("forward")
        outputs = list(value) if isinstance(value, tuple) else [value]
        seeds = problem.cotangent if isinstance(problem.cotangent, tuple) else (problem.cotangent,)
        seeds = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, [x, *problem.parameters], seeds)
        lap("backward")
        return value, list(gradients)

    def timed(self, solve: Solve) -> Callable[[Stopwatch], None]:
        """For :func:`interleave`: phases ``"forward"`` and ``"backward"``."""
        return lambda watch: void(self.solve(solve, lap=watch.lap))

    def timed_forward(self, solve: Solve) -> Callable[[Stopwatch], None]:
        """For :func:`interleave`: the solve alone, without gradients."""

        def run(watch: Stopwatch) -> None:
            with torch.no_grad(), self._precision():
                solve(self.problem.f, self.problem.context)
            watch.lap("forward")

        return run

    def peak(self, solve: Solve) -> int:
        """Peak bytes of forward and backward."""
        return peak_bytes(lambda: self.solve(solve), self.device)

    def count_forward(self, solve: Solve) -> Counts:
        """What the solve alone does, without gradients."""
        counts = Counts()
        with torch.no_grad(), self._precision():
            solve(counted(self.problem.f, counts), self.problem.context)
        return counts

    def quality(
        self,
        candidate: Candidate,
        tol: float,
        limits: Limits | None = None,
        backward_tol: float | None = None,
    ) -> Quality:
        """Solve once and hold the result against the reference; what it raises becomes its reason."""
        counts, watch = Counts(), Stopwatch(self.device)
        try:
            made = candidate.make(self.problem, tol, limits or Limits.at(self.reference, tol), backward_tol)
            watch.start()
            value, gradients = self.solve(made, counted(self.problem.f, counts), watch.lap)
        except Exception as error:
            return Quality(reason=reason_of(error))
        seconds = watch.laps()["total"]
        z = flat(value).detach()
        residual = self._residual(value)
        error = (z.to("cpu", torch.float64) - self.reference.z).norm(dim=1) / self.reference.z.norm(dim=1)
        weights = torch.cat([gradient.flatten() for gradient in gradients[1:]])
        return Quality(
            gradient_error=finite(gradient_error(self.reference, weights, gradients[0])),
            solution_error=finite(float(error.max())),
            residual=finite(float(residual.max())),
            failed_rows=int((~(residual <= 1.01 * tol)).sum()),
            rows=counts.rows,
            product_rows=counts.product_rows,
            seconds=seconds,
        )

    @torch.no_grad()
    def _residual(self, value: Any) -> Tensor:
        """(B,) the true residual, of the map as the candidate saw it."""
        parts = tuple(v.detach() for v in value) if isinstance(value, tuple) else value.detach()
        with self._precision():
            after = flat(self.problem.f(parts, *self.problem.context)).float()
        return (after - flat(parts).float()).norm(dim=1) / (after.norm(dim=1) + 1e-9)

    def loosest(
        self,
        candidate: Candidate,
        start: float,
        target: float,
        known: dict[float, Quality],
        patience: float = float("inf"),
    ) -> float | None:
        """The loosest tolerance of the ladder, near ``start``, whose gradient error is at most ``target``.

        Walks by half-decades to looser tolerances while they will do, or to tighter ones until one does;
        then tries the quarter-decade in between. Gives up on a candidate at twice ``patience`` seconds.
        """

        def good(place: int) -> bool:
            tol = LADDER[place]
            if tol not in known:
                known[tol] = self.quality(candidate, tol)
            return known[tol].gradient_error <= target

        place = LADDER.index(at_most(start))
        if good(place):
            while place >= 2 and good(place - 2):
                place -= 2
        else:
            for place in range(place + 2, min(place + 12, len(LADDER)), 2):  # noqa: B020
                done = good(place) or known[LADDER[place]].reason
                if done or known[LADDER[place]].seconds > 2 * patience:
                    break
            if not good(place):
                return None
        return LADDER[place - 1] if place >= 1 and good(place - 1) else LADDER[place]


def void(value: object) -> None:
    """Drop a value, so that nothing of a timed run outlives it."""


def finite(value: float) -> float:
    """The value, with NaN as infinity."""
    return value if value == value else float("inf")


def only_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: None stands for it."""
    return {k: None if isinstance(v, float) and v == float("inf") else v for k, v in values.items()}
