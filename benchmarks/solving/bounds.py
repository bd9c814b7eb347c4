"""Why a ratio is what it is: how much of it the evaluations decide, and how much the work between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..harness import Table
from .headline import PHASES, fastest, problems_of, targets_of

__all__ = ["Bound", "bound_table", "bounds"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Bound:
    """A ratio of torchdeq's time to ours, taken apart.

    ``ratio = (their evaluations / ours) * (their price / our price)``. Evaluations are rows of f and, with
    the gradient, rows of its transposed Jacobian, each weighed by what it costs in the bare loop, which
    evaluates the whole batch at once. A price is time over evaluations so weighed; 1 is the bare loop's.

    Attributes:
        problem: its name.
        tol: the reference tolerance.
        precision: ``"float32"`` or ``"bfloat16 autocast"``.
        phase: ``"forward"`` or ``"total"``.
        target: the ratio that was to be reached.
        ratio: of median times.
        evaluations: theirs over ours.
        theirs: price.
        ours: price.
        ours_name: our fastest.
        fewest: the largest ratio that any solver of ours would reach at the bare price.
        fewest_name: that solver.
    """

    problem: str
    tol: float
    precision: str
    phase: str
    target: float
    ratio: float
    evaluations: float
    theirs: float
    ours: float
    ours_name: str
    fewest: float
    fewest_name: str

    @property
    def alone(self) -> float:
        """The ratio if our fastest spent nothing but the bare price of its evaluations."""
        return self.ratio * self.ours

    def why(self) -> str:
        """What keeps the ratio from its target, in a sentence."""
        if self.ratio >= self.target:
            return "reached"
        if self.fewest < self.target:
            return "evaluations: no solver of ours makes few enough, had they no bookkeeping at all"
        if self.alone < self.target:
            return (
                f"evaluations: {self.fewest_name} makes fewer, and spends more between them than that saves"
            )
        return (
            f"what is between the evaluations, small batches included: it takes a price of {self.needed:.2f}"
        )

    @property
    def needed(self) -> float:
        """The price at which our fastest would reach the target."""
        return self.alone / self.target


def bounds(cells: list[dict[str, Any]]) -> list[Bound]:
    """One for every target and tolerance, of the first seed that has it; equally accurate gradients."""
    found: dict[tuple[Any, ...], Bound] = {}
    for cell in problems_of(cells):
        problem, precision = cell["options"]["problem"], cell["options"]["precision"]
        _, targets = targets_of(problem, cells)
        for comparison in cell["data"]["comparisons"]:
            for phase, target in targets.items():
                key = (problem, precision, comparison["tol"], phase)
                parts = _parts(comparison, phase)
                if parts is not None and key not in found:
                    found[key] = Bound(problem, comparison["tol"], precision, phase, target, *parts)
    return list(found.values())


def _parts(comparison: Record, phase: str) -> tuple[float, float, float, float, str, float, str] | None:
    records, floor = comparison["views"]["equal gradient error"], comparison["floor"]
    rival, best = fastest(records, "torchdeq", phase), fastest(records, "ours", phase)
    if rival is None or best is None or floor["reason"]:
        return None

    def bare(record: Record) -> float:
        seconds = record["rows"] * floor["forward"]["median"] / floor["rows"]
        if phase == "total":
            seconds += record["product_rows"] * floor["backward"]["median"] / floor["product_rows"]
        return seconds

    able = [r for r in records if r["family"] == "ours" and r["converged"]]
    least = min(able, key=bare)
    their_time, our_time = rival[phase]["median"], best[phase]["median"]
    return (
        their_time / our_time,
        bare(rival) / bare(best),
        their_time / bare(rival),
        our_time / bare(best),
        best["candidate"],
        their_time / bare(least),
        least["candidate"],
    )


def bound_table(cells: list[dict[str, Any]]) -> Table:
    """The targets again, each with what decides it."""
    rows = []
    for b in bounds(cells):
        bf16 = "" if b.precision == "float32" else ", bf16"
        rows.append(
            (
                f"`{b.problem}`, {PHASES[b.phase]}",
                f"{b.tol:.0e}{bf16}",
                f"{b.target:g}x",
                f"{b.ratio:.2f}",
                f"{b.evaluations:.2f}",
                f"{b.theirs:.2f}",
                f"{b.ours:.2f} ({b.ours_name})",
                f"{b.alone:.2f}",
                f"{b.fewest:.2f} ({b.fewest_name})",
                b.why(),
            )
        )
    columns = (
        "problem",
        "tol",
        "to reach",
        "ratio",
        "evaluations, theirs over ours",
        "their price",
        "our price",
        "at the bare price",
        "fewest evaluations at the bare price",
        "why",
    )
    notes = (
        "A ratio is that of the evaluations times that of the prices. Evaluations: rows of f, and of its "
        "transposed Jacobian with the gradient, weighed by their cost in the bare loop. Price: time over "
        "evaluations so weighed, 1 for the bare loop, which has the whole batch in every call: where rows "
        "leave, calls with few rows cost more a row, and that counts as price, too. At the bare price: the "
        "ratio if our fastest, or the solver of ours with the fewest evaluations, spent nothing else.",
    )
    return Table("What decides the ratios", columns, rows, notes)
