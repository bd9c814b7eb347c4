"""From the cells of ``solvers`` to its tables: targets beside what was measured, ratios, every candidate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..harness import Claim, Table
from .compare import TOLD

__all__ = [
    "TARGETS",
    "Headline",
    "claims",
    "full_tables",
    "headlines",
    "overhead_table",
    "problems_of",
    "ratio_table",
    "target_table",
    "targets_of",
]

Record = dict[str, Any]
PHASES = {"forward": "forward", "total": "forward + backward"}
TARGETS = {
    "c": ("mixed difficulty, vector", {"forward": 6.0, "total": 5.0}),
    "c_conv": ("mixed difficulty, conv cell", {"forward": 6.0, "total": 5.0}),
    "a_hard": ("slow, uniform", {"forward": 4.0, "total": 3.0}),
    "b": ("conv cell, uniform", {"forward": 1.5, "total": 1.5}),
    "easy": ("easy, small", {"forward": 1.7, "total": 1.3}),
}
"""Ratios of torchdeq's time to ours that were to be reached, by problem."""
GPU_EASY_TARGET = 3.0
OTHERS = {
    "a": "uniform vector",
    "nonsymmetric": "non-symmetric",
    "two_scale": "two scales, tuple state",
    "resnet_span": "ResNet span",
}
MEMORY_TARGET = 0.75
OVERHEAD_TARGETS = {"b": 1.15, "a": 1.3, "easy": 1.3}
PLAIN = "torchdeq fixed_point_iter / fixed_point_iter"
AUTO = "auto / implicit"


@dataclass(frozen=True)
class Headline:
    """torchdeq's fastest converged candidate against ours, at equal gradient error.

    Attributes:
        problem: its name.
        tol: the reference tolerance.
        precision: ``"float32"`` or ``"bfloat16 autocast"``.
        phase: ``"forward"`` or ``"total"``.
        ratios: per seed, median and quartiles of theirs over ours.
        told: per seed, the median ratio where ``simple_fixed_point_iter``, which is told how many
            iterations to make, counts among torchdeq's.
        auto: per seed, the median ratio with ``auto`` instead of our fastest.
        theirs: names and seconds of torchdeq's fastest, per seed.
        ours: the same of ours.
    """

    problem: str
    tol: float
    precision: str
    phase: str
    ratios: list[dict[str, float]]
    told: list[float]
    auto: list[float]
    theirs: list[tuple[str, float]]
    ours: list[tuple[str, float]]

    @property
    def ratio(self) -> float | None:
        """Median over seeds; None if either side has no converged candidate."""
        return median(r["median"] for r in self.ratios) if self.ratios else None

    def spread(self) -> str:
        """``2.61 [2.55, 2.70]``: the median and the outermost quartiles of the seeds."""
        if self.ratio is None:
            return "-"
        low, high = min(r["q1"] for r in self.ratios), max(r["q3"] for r in self.ratios)
        return f"{self.ratio:.2f} [{low:.2f}, {high:.2f}]"

    def told_text(self) -> str:
        """``(3.10)``, where the ratio is another if the told solver counts; else empty."""
        if self.ratio is None or not self.told or median(self.told) == self.ratio:
            return ""
        return f" ({median(self.told):.2f})"


def fastest(records: list[Record], family: str, phase: str) -> Record | None:
    """The converged candidate of a family with the smallest median time; told ones do not count."""
    converged = [
        r for r in records if r["family"] == family and r["converged"] and TOLD not in r["candidate"]
    ]
    return min(converged, key=lambda r: r[phase]["median"], default=None)


def problems_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished cells that compare candidates on a problem."""
    return [c for c in cells if c["status"] == "ok" and c["options"].get("kind") == "problem"]


def targets_of(problem: str, cells: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """What a problem stands for and its targets by phase; on a GPU that of the small vector is higher."""
    what, targets = TARGETS.get(problem, (OTHERS.get(problem, problem), {}))
    if problem == "easy" and any(c["data"].get("device") == "cuda" for c in problems_of(cells)):
        return what, {phase: GPU_EASY_TARGET for phase in targets}
    return what, targets


def headlines(cells: list[dict[str, Any]], view: str = "equal gradient error") -> list[Headline]:
    """One for each problem, precision, tolerance and phase, over the seeds."""
    groups: dict[tuple[str, str, float], list[list[Record]]] = {}
    for cell in problems_of(cells):
        for comparison in cell["data"]["comparisons"]:
            key = (cell["options"]["problem"], cell["options"]["precision"], comparison["tol"])
            groups.setdefault(key, []).append(comparison["views"][view])
    return [
        _headline(problem, precision, tol, phase, groups[problem, precision, tol])
        for problem, precision, tol in groups
        for phase in PHASES
    ]


def _headline(problem: str, precision: str, tol: float, phase: str, seeds: list[list[Record]]) -> Headline:
    ratios, told, auto, theirs, ours = [], [], [], [], []
    for records in seeds:
        rival, best = fastest(records, "torchdeq", phase), fastest(records, "ours", phase)
        if rival is not None:
            theirs.append((rival["candidate"].removeprefix("torchdeq "), rival[phase]["median"]))
        if best is not None:
            ours.append((best["candidate"], best[phase]["median"]))
        if rival is not None and best is not None:
            ratios.append(best[f"{phase}_ratio"])
            told.append(best[f"{phase}_ratio_told"]["median"])
        auto += [
            r[f"{phase}_ratio"]["median"] for r in records if r["candidate"] == AUTO and f"{phase}_ratio" in r
        ]
    return Headline(problem, tol, precision, phase, ratios, told, auto, theirs, ours)


def _names(side: list[tuple[str, float]]) -> str:
    """Names with the median of their milliseconds."""
    if not side:
        return "none converged"
    names = dict.fromkeys(name for name, _ in side)
    return f"{' or '.join(names)}, {1e3 * median(seconds for _, seconds in side):.3g} ms"


def _where(line: Headline) -> str:
    bf16 = "" if line.precision == "float32" else ", bf16"
    return f"{line.tol:.0e}{bf16}"


def met(values: list[float | None], target: float, at_least: bool = True) -> str:
    """``yes``, ``in part``, ``no`` or ``not measured``."""
    known = [v for v in values if v is not None]
    if not known:
        return "not measured"
    good = [v >= target if at_least else v <= target for v in known]
    return "yes" if all(good) and len(known) == len(values) else "in part" if any(good) else "no"


def target_table(cells: list[dict[str, Any]]) -> Table:
    """What was to be reached beside what was measured."""
    lines, rows = headlines(cells), []
    for problem in TARGETS:
        what, targets = targets_of(problem, cells)
        for phase, target in targets.items():
            mine = [h for h in lines if h.problem == problem and h.phase == phase]
            measured = "; ".join(f"{_where(h)}: {h.spread()}{h.told_text()}" for h in mine) or "-"
            verdict = met([h.ratio for h in mine], target)
            rows.append((f"{what} (`{problem}`), {PHASES[phase]}", f"{target:g}x", measured, verdict))
    for problem in ("b", "c_conv"):
        shares = memory_shares(cells, problem)
        rows.append(
            (
                f"peak memory, forward + backward, against torchdeq's plain solver (`{problem}`)",
                f"at most {MEMORY_TARGET:g}",
                "; ".join(f"{name}: {share:.2f}" for name, share in shares) or "-",
                met([share for _, share in shares], MEMORY_TARGET, at_least=False),
            )
        )
    for problem, target in OVERHEAD_TARGETS.items():
        ours = {
            r["candidate"]: r["ratio"]
            for r in overheads(cells, problem)
            if r["family"] == "ours" and "ratio" in r
        }
        rows.append(
            (
                f"bookkeeping, time per evaluation against bare f (`{problem}`)",
                f"at most {target:g}",
                "; ".join(f"{name}: {ratio['median']:.2f}" for name, ratio in ours.items()) or "-",
                met([ours["picard"]["median"]] if "picard" in ours else [], target, at_least=False),
            )
        )
    notes = (
        "Ratios: time of torchdeq's fastest converged candidate over that of our fastest, at equal gradient "
        "error; median over rounds (and seeds) with quartiles, at each reference tolerance; in parentheses "
        "the ratio if torchdeq's simple_fixed_point_iter counts, which has no stopping rule and is told how "
        "many iterations to make. Bookkeeping: the verdict is on plain iteration, the others do more work "
        "by design.",
    )
    return Table("Targets", ("target", "to reach", "measured", "met?"), rows, notes)


def ratio_table(cells: list[dict[str, Any]]) -> Table:
    """All problems: who is fastest on either side, in both views."""
    rows = []
    for view in ("equal gradient error", "equal tolerance"):
        for h in headlines(cells, view):
            told = f"{median(h.told):.2f}" if h.told else "-"
            auto = f"{median(h.auto):.2f}" if h.auto else "-"
            rows.append(
                (
                    h.problem,
                    _where(h),
                    view,
                    PHASES[h.phase],
                    _names(h.theirs),
                    _names(h.ours),
                    h.spread(),
                    told,
                    auto,
                )
            )
    columns = (
        "problem",
        "tol",
        "view",
        "phase",
        "torchdeq's fastest",
        "our fastest",
        "ratio",
        "if told counts",
        "auto's ratio",
    )
    return Table("Fastest against fastest", columns, rows)


def memory_shares(cells: list[dict[str, Any]], problem: str) -> list[tuple[str, float]]:
    """Peak memory of ours over that of torchdeq's plain solver, smallest first; medians over seeds."""
    shares: dict[str, list[float]] = {}
    for cell in problems_of(cells):
        if cell["options"]["problem"] != problem or cell["options"]["precision"] != "float32":
            continue
        records = cell["data"]["comparisons"][0]["views"]["equal gradient error"]
        plain = next((r.get("peak_bytes") for r in records if r["candidate"] == PLAIN), None)
        for record in records:
            if plain and record["family"] == "ours" and record.get("peak_bytes"):
                shares.setdefault(record["candidate"], []).append(record["peak_bytes"] / plain)
    return sorted(((name, median(v)) for name, v in shares.items()), key=lambda pair: pair[1])


def overheads(cells: list[dict[str, Any]], problem: str) -> list[Record]:
    """The bookkeeping records of a problem."""
    for cell in cells:
        if cell["status"] == "ok" and cell["options"] == {"kind": "overhead", "problem": problem, "seed": 0}:
            return cell["data"]["overhead"]
    return []


def overhead_table(cells: list[dict[str, Any]]) -> Table:
    """Time per evaluation beside bare f."""
    rows = []
    for problem in ("a", "b", "easy"):
        for r in overheads(cells, problem):
            if r["reason"]:
                rows.append((problem, r["candidate"], "failed", r["reason"]))
                continue
            each, ratio = r["per_evaluation"], r["ratio"]
            spread = f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
            rows.append((problem, r["candidate"], f"{1e3 * each['median']:.4g}", spread))
    columns = ("problem", "solver", "ms per evaluation", "over bare f")
    return Table("Bookkeeping: a fixed number of iterations, no row leaves, no gradient", columns, rows)


def full_tables(cells: list[dict[str, Any]]) -> Iterator[Table]:
    """Every candidate on every problem, failed ones with their reason."""
    columns = (
        "candidate",
        "view",
        "tol",
        "gradient error",
        "worst state error",
        "rows above tol",
        "rows of f",
        "rows of J^T u",
        "forward ms",
        "total ms [quartiles], rounds",
        "peak MB",
        "why not counted",
    )
    for cell in problems_of(cells):
        for comparison in cell["data"]["comparisons"]:
            floor = comparison["floor"]
            rows = [_row("bare loop of f", "floor", {**floor, "tol": comparison["tol"]})]
            for view, records in comparison["views"].items():
                rows += [_row(r["candidate"], view.removeprefix("equal "), r) for r in records]
            yield Table(
                f"{cell['key']}, reference tolerance {comparison['tol']:.0e}, batch {cell['data']['batch']}, "
                f"target gradient error {comparison['target']:.2e}",
                columns,
                rows,
                long=True,
            )


def _row(name: str, view: str, r: Record) -> tuple[str, ...]:
    total, forward = r.get("total"), r.get("forward")
    if total is None or forward is None:
        return (name, view, *["-"] * 9, r["reason"])
    return (
        name,
        view,
        f"{r['tol']:.1e}",
        number(r["gradient_error"]),
        number(r["solution_error"]),
        str(r["failed_rows"]),
        str(r["rows"]),
        str(r["product_rows"]),
        f"{1e3 * forward['median']:.3g}",
        f"{1e3 * total['median']:.3g} [{1e3 * total['q1']:.3g}, {1e3 * total['q3']:.3g}], {total['n']}",
        f"{r['peak_bytes'] / 1e6:.1f}" if r.get("peak_bytes") else "-",
        r.get("reason", ""),
    )


def number(value: float | None) -> str:
    """A figure in two digits; infinity, which JSON has not, for None."""
    return "inf" if value is None else f"{value:.1e}"


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """Lines of the index page: ratios at equal gradient error, memory, bookkeeping."""
    made = []
    for h in headlines(cells):
        what, targets = targets_of(h.problem, cells)
        target = targets.get(h.phase)
        made.append(
            Claim(
                f"{what} (`{h.problem}`), {PHASES[h.phase]}, tol {_where(h)}",
                _names(h.theirs),
                _names(h.ours),
                h.spread() + h.told_text(),
                f"{target:g}x" if target else "none",
                met([h.ratio], target) if target else "-",
            )
        )
    for problem in ("b", "c_conv"):
        shares = memory_shares(cells, problem)
        if shares:
            verdict = met([share for _, share in shares], MEMORY_TARGET, at_least=False)
            made.append(
                Claim(
                    f"peak memory, forward + backward (`{problem}`)",
                    "fixed_point_iter / fixed_point_iter: 1",
                    "; ".join(f"{name}: {share:.2f}" for name, share in shares),
                    f"{shares[0][1]:.2f} to {shares[-1][1]:.2f}",
                    f"<= {MEMORY_TARGET:g}",
                    verdict,
                )
            )
    for problem, target in OVERHEAD_TARGETS.items():
        found = {r["candidate"]: r.get("ratio") for r in overheads(cells, problem)}
        rival, mine = found.get("torchdeq fixed_point_iter"), found.get("picard")
        if rival and mine:
            made.append(
                Claim(
                    f"bookkeeping per evaluation over bare f (`{problem}`)",
                    f"fixed_point_iter: {rival['median']:.2f}",
                    "picard",
                    f"{mine['median']:.2f} [{mine['q1']:.2f}, {mine['q3']:.2f}]",
                    f"<= {target:g}",
                    met([mine["median"]], target, at_least=False),
                )
            )
    return made
