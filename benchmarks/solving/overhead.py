"""Bookkeeping: what an iteration costs beyond f itself.

A fixed number of iterations without gradients at a tolerance that nothing reaches, so that no row leaves:
the time per evaluation over that of a bare loop of f with as many evaluations, round by round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..harness import interleave, ratio_of, spread_of
from ..harness.run import reason_of
from .candidates import Bare, Candidate, Limits
from .measure import Bench

__all__ = ["ITERATIONS", "overhead"]

ITERATIONS: Mapping[str, int] = {"a": 24, "b": 24, "easy": 14}
"""Per problem: few enough that no row meets the rounding floor of float32 and is reported stagnated."""
UNREACHABLE = 1e-30


def overhead(
    bench: Bench, candidates: list[Candidate], *, budget_s: float, max_rounds: int, seed: int
) -> list[dict[str, Any]]:
    """One record for each candidate; candidates that differ only backward are taken once."""
    limits = Limits(ITERATIONS[bench.problem.name], 1, exactly=True)
    floor, runs, calls, records = Bare(), {}, {}, []
    for candidate in [floor, *candidates]:
        name = candidate.name.partition(" / ")[0]
        if name in runs:
            continue
        try:
            solve = candidate.make(bench.problem, UNREACHABLE, limits)
            calls[name] = bench.count_forward(solve).calls
        except Exception as error:
            records.append({"candidate": name, "family": candidate.family, "reason": reason_of(error)})
            continue
        runs[name] = bench.timed_forward(solve)
        records.append({"candidate": name, "family": candidate.family, "reason": "", "calls": calls[name]})
    laps = interleave(
        runs,
        device=bench.device,
        budget_s=budget_s,
        max_rounds=max_rounds,
        seed=seed,
        slow_factor=float("inf"),
    )
    per_call = {
        name: [lap["total"] / calls[name] if lap else None for lap in rounds] for name, rounds in laps.items()
    }
    for record in records:
        name = record["candidate"]
        if name in per_call:
            record["per_evaluation"] = spread_of([t for t in per_call[name] if t is not None]).as_json()
            record["ratio"] = ratio_of(per_call[name], per_call[floor.name]).as_json()
    return records
