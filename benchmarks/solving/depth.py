"""One problem at one depth, all ways to differentiate: the work of a cell of ``backward``.

The forward pass makes exactly as many iterations as the depth says, at a tolerance that nothing reaches
(Anderson and Broyden may reach the rounding floor first and stop there). An implicit backward pass solves
to a tolerance of 1e-5, relative to the incoming gradient. The error is that of the gradient against the
float64 gradient at the fixed point: it has a share from the forward pass being cut short.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import twnn_plugin as tw

from ..harness import interleave, ratio_of, spread_of
from .candidates import Candidate, Limits, Ours, Torchdeq, linear_solvers
from .compare import column
from .measure import Bench, Quality, only_numbers
from .overhead import UNREACHABLE

__all__ = ["BACKWARD_TOL", "TRACED", "differentiate", "ways"]

BACKWARD_TOL = 1e-5
FORWARD = ("picard", "anderson", "broyden")
IMPLICIT = "implicit"


@dataclass(frozen=True)
class Unrolled(Torchdeq):
    """torchdeq's nearest to unrolling: a phantom gradient through all iterations but the first."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"torchdeq {self.forward} / phantom(depth)"


def ways(depth: int, quick: bool) -> list[Candidate]:
    """torchdeq's gradients, then ours: every registered adjoint, and every solver of the implicit one."""
    plain = "fixed_point_iter"
    found: list[Candidate] = [Torchdeq(plain, b) for b in (plain, "anderson", "broyden")[: 1 if quick else 3]]
    found += [Torchdeq(plain, plain, grad=k) for k in ((5,) if quick else (1, 5))]
    found.append(Unrolled(plain, plain, grad=max(1, depth - 1)))
    adjoints = [name for name in tw.adjoints.names() if name not in tw.solvers.names()]
    for solver in FORWARD[:1] if quick else FORWARD:
        found += [Ours(solver, adjoint) for adjoint in adjoints]
    found += [Ours(name, name) for name in tw.adjoints.names() if name in tw.solvers.names()]
    found += [Ours("picard", IMPLICIT, name) for name in linear_solvers()]
    return found


TRACED = {
    "torchdeq fixed_point_iter / fixed_point_iter",
    "torchdeq fixed_point_iter / phantom(depth)",
    "picard / implicit",
    "picard / unrolled",
    "picard / checkpointed",
    "picard / phantom",
    "picard / one_step",
}
"""Whose peak memory is measured: the ways that differ in what they keep."""


def differentiate(
    bench: Bench, depth: int, *, quick: bool, budget_s: float, max_rounds: int, seed: int
) -> list[dict[str, Any]]:
    """One record for each way to differentiate."""
    products = bench.reference.max_products(BACKWARD_TOL)
    found: dict[str, tuple[Candidate, Limits, Quality]] = {}
    for candidate in ways(depth, quick):
        steps = 1 if isinstance(candidate, Unrolled) else depth
        limits = Limits(steps, products, exactly=True)
        quality = bench.quality(candidate, UNREACHABLE, limits, BACKWARD_TOL)
        found[candidate.name] = (candidate, limits, quality)
    made = {
        name: candidate.make(bench.problem, UNREACHABLE, limits, BACKWARD_TOL)
        for name, (candidate, limits, quality) in found.items()
        if not quality.reason
    }
    laps = interleave(
        {name: bench.timed(solve) for name, solve in made.items()},
        device=bench.device,
        budget_s=budget_s,
        max_rounds=max_rounds,
        seed=seed,
        warmup=bench.device == "cuda",
        anchors=[name for name in made if name.startswith("torchdeq") and is_implicit(found[name][0])],
        slow_factor=4.0,
    )
    records = []
    for name, (candidate, _, quality) in found.items():
        record = {"candidate": name, "family": candidate.family, **only_numbers(asdict(quality))}
        record["implicit"] = is_implicit(candidate)
        if name in made:
            rounds = [lap for lap in laps[name] if lap]
            for phase in ("forward", "backward", "total"):
                record[phase] = spread_of([lap[phase] for lap in rounds]).as_json()
            traced: Collection[str] = made if bench.device == "cuda" else TRACED
            record["peak_bytes"] = bench.peak(made[name]) if name in traced else None
        records.append(record)
    rival = fastest_implicit(records, "torchdeq")
    if rival is not None:
        theirs = column(laps[rival["candidate"]], "backward")
        for record in records:
            if record["family"] == "ours" and record["implicit"] and not record["reason"]:
                mine = column(laps[record["candidate"]], "backward")
                record["backward_ratio"] = {**ratio_of(theirs, mine).as_json(), "of": rival["candidate"]}
    return records


def is_implicit(candidate: Candidate) -> bool:
    """Whether the gradient is that of the fixed point."""
    if isinstance(candidate, Torchdeq):
        return not candidate.grad
    return isinstance(candidate, Ours) and candidate.adjoint == IMPLICIT


def fastest_implicit(
    records: list[dict[str, Any]], family: str, error: float = float("inf")
) -> dict[str, Any] | None:
    """Of a family, the implicit way with the fastest backward pass and at most this gradient error."""
    able = [
        r
        for r in records
        if r["family"] == family
        and r["implicit"]
        and not r["reason"]
        and (r["gradient_error"] or 9e9) <= error
    ]
    return min(able, key=lambda r: r["backward"]["median"], default=None)
