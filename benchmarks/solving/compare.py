"""One problem, all candidates: the work of a cell of ``solvers``.

Equal tolerance is not equal accuracy: a batch-wide test over-solves easy rows, an accelerated method stops
far below its tolerance, and a row that leaves at the tolerance has an error of about the tolerance over one
minus its contraction rate. So every candidate is measured in two views for each reference tolerance:

* ``equal tolerance``: forward and backward at the reference tolerance. It counts as converged if the true
  residual of every row, computed afterwards, is within it.
* ``equal gradient error``: the target is 1.1 times the gradient error, against float64, of the plainest of
  all methods, iteration by a bare loop until every row meets the reference tolerance, forward and backward.
  Each candidate gets the loosest tolerance of a quarter-decade ladder whose gradient error is at most the
  target. It counts as converged if there is one. For a candidate that takes more than three times as long
  as torchdeq's fastest at the reference tolerance, and over 0.1 s, none is looked for: it cannot be the
  fastest.

Headline ratios are of the second view: the time of torchdeq's fastest converged candidate over ours, round
by round. "Ours" is our fastest in the same sense; the ratio of the solver ``auto`` alone, which a user would
pick without looking, stands beside it. ``simple_fixed_point_iter`` has no stopping rule, so that it cannot be
said to converge; told the right number of iterations it is the bare loop. It is in every table, and the ratio
that counts it among torchdeq's stands beside the headline.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ..harness import Spread, interleave, ratio_of, spread_of
from ..harness.timing import Laps
from .candidates import Bare, Candidate, Limits
from .measure import Bench, Quality, only_numbers
from .reference import at_most

__all__ = ["SLACK", "column", "compare"]

SLACK = 1.1
_SLOW = 3.0
_CHEAP_S = 0.1  # below this a single measurement says little, and looking costs little
TOLD = "simple_fixed_point_iter"
"""torchdeq's solver without a stopping rule, which is told how many iterations to make."""
PHASES = ("forward", "backward", "total")
_Rounds = dict[str, list[Laps | None]]


def compare(
    bench: Bench,
    candidates: list[Candidate],
    tol: float,
    *,
    budget_s: float,
    max_rounds: int,
    seed: int,
    memory: Collection[str] = (),
) -> dict[str, Any]:
    """Measure candidates at one reference tolerance.

    Args:
        bench: the problem.
        candidates: what to compare.
        tol: the reference tolerance.
        budget_s: seconds after which no new round of timing begins.
        max_rounds: rounds at most.
        seed: of the order of the candidates.
        memory: names of the candidates whose peak memory is measured (tracing it takes long).

    Returns:
        JSON values: the target, the floor, and one record for each candidate and view.
    """
    tol, floor = at_most(tol), Bare()
    plain = bench.quality(floor, tol)
    if plain.reason:
        raise RuntimeError(f"the bare loop failed: {plain.reason}")
    target = SLACK * plain.gradient_error
    known = {candidate.name: {tol: bench.quality(candidate, tol)} for candidate in candidates}
    able = [known[c.name][tol] for c in candidates if c.family == "torchdeq"]
    patience = _SLOW * min((q.seconds for q in able if not q.reason), default=float("inf"))
    patience = max(patience, _CHEAP_S)
    if bench.device == "cuda":  # who was the first to run loaded its kernels in that time: once more
        for candidate in candidates:
            first = known[candidate.name][tol]
            if not first.reason and first.seconds > patience:
                known[candidate.name][tol] = bench.quality(candidate, tol)
    chosen = {
        candidate.name: bench.loosest(candidate, tol, target, known[candidate.name], patience)
        for candidate in candidates
        if not known[candidate.name][tol].reason and known[candidate.name][tol].seconds <= patience
    }
    laps, peaks = _time(bench, candidates, floor, tol, known, chosen, budget_s, max_rounds, seed, memory)
    views = {}
    for view, tolerances in (
        ("equal tolerance", {c.name: tol for c in candidates}),
        ("equal gradient error", chosen),
    ):
        records = [
            _record(candidate, tolerances.get(candidate.name), known[candidate.name], laps, peaks, view)
            for candidate in candidates
        ]
        _add_ratios(records, laps)
        views[view] = records
    return {
        "tol": tol,
        "target": target,
        "floor": {**only_numbers(asdict(plain)), **_spreads(laps[floor.name])},
        "views": views,
    }


def _time(
    bench: Bench,
    candidates: list[Candidate],
    floor: Candidate,
    tol: float,
    known: dict[str, dict[float, Quality]],
    chosen: Mapping[str, float | None],
    budget_s: float,
    max_rounds: int,
    seed: int,
    memory: Collection[str],
) -> tuple[_Rounds, dict[str, int]]:
    made = {floor.name: floor.make(bench.problem, tol, Limits.at(bench.reference, tol))}
    rivals = []
    for candidate in candidates:
        if known[candidate.name][tol].reason:
            continue
        for one in {tol, chosen.get(candidate.name) or tol}:
            job = _job(candidate.name, one)
            made[job] = candidate.make(bench.problem, one, Limits.at(bench.reference, one))
            if candidate.family == "torchdeq":
                rivals.append(job)
    peaks = {
        _job(c.name, one): bench.peak(made[_job(c.name, one)])
        for c in candidates
        if c.name in memory and (one := chosen.get(c.name)) is not None
    }
    runs = {job: bench.timed(solve) for job, solve in made.items()}
    laps = interleave(
        runs,
        device=bench.device,
        budget_s=budget_s,
        max_rounds=max_rounds,
        seed=seed,
        warmup=bench.device == "cuda",  # on the CPU the qualifying runs have warmed everything up
        anchors=rivals,
    )
    return laps, peaks


def _job(name: str, tol: float) -> str:
    return f"{name} @ {tol:.1e}"


def _record(
    candidate: Candidate,
    tol: float | None,
    known: dict[float, Quality],
    laps: _Rounds,
    peaks: dict[str, int],
    view: str,
) -> dict[str, Any]:
    best = known[tol if tol is not None else min(known)]
    record: dict[str, Any] = {"candidate": candidate.name, "family": candidate.family, "tol": tol}
    record.update(only_numbers(asdict(best)))
    if best.reason:
        return {**record, "converged": False}
    if tol is None:
        reason = f"no tolerance down to {min(known):.0e} reaches the target"
        if len(known) == 1:
            reason = f"not looked for: over {_SLOW:g} times the time of torchdeq's fastest"
        return {**record, "reason": reason, "converged": False}
    job = _job(candidate.name, tol)
    converged = best.failed_rows == 0 if view == "equal tolerance" else True
    if not converged:
        record["reason"] = f"{best.failed_rows} rows above the tolerance"
    return {
        **record,
        "converged": converged,
        "job": job,
        "peak_bytes": peaks.get(job),
        **_spreads(laps[job]),
    }


def _spreads(rounds: list[Laps | None]) -> dict[str, Any]:
    made = {}
    for phase in PHASES:
        made[phase] = spread_of([lap[phase] for lap in rounds if lap]).as_json()
    return made


def _add_ratios(records: list[dict[str, Any]], laps: _Rounds) -> None:
    """Beside each converged candidate: torchdeq's fastest over it, round by round.

    Twice: against those that find out by themselves when to stop, and against all.
    """
    rivals = [r for r in records if r["family"] == "torchdeq" and r["converged"]]
    ruled = [r for r in rivals if TOLD not in r["candidate"]]
    for phase in ("forward", "total"):
        for key, able in ((f"{phase}_ratio", ruled), (f"{phase}_ratio_told", rivals)):
            best = min(able, key=lambda record: record[phase]["median"], default=None)
            if best is None:
                continue
            theirs = column(laps[best["job"]], phase)
            for record in records:
                if record["converged"]:
                    ratio: Spread = ratio_of(theirs, column(laps[record["job"]], phase))
                    record[key] = {**ratio.as_json(), "of": best["candidate"]}


def column(rounds: list[Laps | None], phase: str) -> list[float | None]:
    """The seconds of one phase, round by round; None where the candidate did not run."""
    return [None if lap is None else lap[phase] for lap in rounds]
