"""From the cells of ``wormholes`` to its tables and claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from ..harness import Claim, Table
from .tasks import TASKS, Task

__all__ = ["Record", "Runs", "claims", "interval", "paired", "runs_of", "tables"]

Record = dict[str, Any]
Runs = dict[str, dict[int, Record]]
"""The data of finished cells by arm and seed."""

CLEARLY, GATE_MARGIN, SHARE_MARGIN, PARITY, AIM, COST = 1.0, 0.7, 2.0, 0.3, 0.3, 1.2


def runs_of(cells: list[dict[str, Any]], task: str) -> Runs:
    """The finished runs of one task."""
    found: Runs = {}
    for cell in cells:
        options = cell["options"]
        if cell["status"] == "ok" and options["task"] == task:
            found.setdefault(options["arm"], {})[options["seed"]] = cell["data"]
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % confidence interval (Student's t); NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values), float(half)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Differences seed by seed, over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def tested(runs: Runs, arm: str, state: str | None = None) -> dict[int, float]:
    """Test accuracy by seed; ``state``: of a wormhole network ``"closed"``, ``"open"`` or ``"gated"``."""
    found = runs.get(arm, {})
    if state == "gated":
        return {seed: data["gated"]["accuracy"] for seed, data in found.items()}
    return {seed: data["test"][state or "accuracy"] for seed, data in found.items()}


def pick(runs: Runs, arm: str, *path: str) -> list[float]:
    """One figure of every seed."""
    values = []
    for data in runs.get(arm, {}).values():
        value: Any = data
        for name in path:
            value = value[name]
        values.append(value)
    return values


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean and range."""
    if not values:
        return "-"
    middle = f"{mean(values):.{digits}f}"
    if len(set(values)) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compared(differences: Sequence[float]) -> str:
    """A mean difference with its confidence interval."""
    if not differences:
        return "-"
    middle, half = interval(differences)
    return f"{middle:+.2f}" if math.isnan(half) else f"{middle:+.2f} ± {half:.2f}"


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """For each task: the networks; the gates; the steps."""
    made = []
    for task in TASKS.values():
        runs = runs_of(cells, task.name)
        if runs:
            made += [_networks(task, runs), _gate_table(task, runs), _step_table(task, runs)]
    return made or [Table("Nothing finished", ("task",), [])]


def _networks(task: Task, runs: Runs) -> Table:
    base = mean(pick(runs, "plain", "cost")) if "plain" in runs else math.nan
    effort = mean(pick(runs, "plain", "training")) if "plain" in runs else math.nan
    plain = tested(runs, "plain")
    rows = []
    for arm in task.arms:
        if arm.name not in runs:
            continue
        fixed = (
            shown(pick(runs, arm.name, "parameters"), 0),
            f"{mean(pick(runs, arm.name, 'training')) / effort:.2f}x",
        )
        states = [(None, pick(runs, arm.name, "cost"))]
        if arm.opening is not None:
            states = [
                ("closed", pick(runs, arm.name, "cost")),
                ("gated", pick(runs, arm.name, "gated", "cost")),
                ("open", pick(runs, arm.name, "open_cost")),
            ]
        for state, costs in states:
            accuracy = tested(runs, arm.name, state)
            rows.append(
                (
                    arm.title + (f", {state}" if state else ""),
                    *fixed,
                    f"{mean(costs) / base:.2f}x",
                    shown(list(accuracy.values())),
                    "" if arm.name == "plain" else compared(paired(accuracy, plain)),
                )
            )
    columns = ("network", "parameters", "training", "inference", "test accuracy, %", "minus plain, points")
    notes = (
        f"{len(plain)} seed(s): mean and range; differences are paired by seed, with the 95 % interval of "
        "their mean (Student's t). Training and inference: multiply-adds executed, over those of the plain "
        "backbone; a backward pass counts as two forward passes. Closed: the wormhole shut for every sample; "
        "gated: open where the gate says, its threshold from validation data; open: for every sample.",
    )
    return Table(f"{task.title}: the networks", columns, rows, notes)


def _gate_table(task: Task, runs: Runs) -> Table:
    rows = []
    for data in list(runs.get("wormhole", {}).values())[:1]:
        for kind, gate in data["gates"].items():
            for place, point in enumerate(gate["curve"]):
                rows.append(_gate_row(runs, kind, place, point["wanted"]))
    columns = (
        *("gate", "share wanted, %", "share got, %", "inference", "accuracy, %"),
        *("random gate of that share, %", "gate minus random, points"),
    )
    notes = (
        "Thresholds are quantiles of validation scores. Entropy: of the closed head's prediction; learned: "
        "the network's own gate. The random gate's figure is its expected value.",
    )
    return Table(f"{task.title}: gates", columns, rows, notes, long=True)


def _gate_row(runs: Runs, kind: str, place: int, wanted: float) -> tuple[str, ...]:
    points = {seed: data["gates"][kind]["curve"][place] for seed, data in runs["wormhole"].items()}
    base = mean(pick(runs, "wormhole", "cost"))
    gain = [point["accuracy"] - point["random"] for point in points.values()]
    return (
        kind,
        f"{100 * wanted:.0f}",
        shown([100 * point["share"] for point in points.values()], 1),
        f"{mean(point['cost'] for point in points.values()) / base:.2f}x",
        shown([point["accuracy"] for point in points.values()]),
        shown([point["random"] for point in points.values()]),
        compared(gain),
    )


def _step_table(task: Task, runs: Runs) -> Table:
    rows = []
    for seed, data in runs.get("wormhole", {}).items():
        steps = data["steps"]
        ranks = ", ".join(
            f"{name} {value:+.2f}" for name, value in steps["rank_correlation"].items() if value is not None
        )
        rows.append(
            (
                str(seed),
                f"{data['tol']:g}",
                f"{steps['mean']:.2f}",
                f"{100 * steps['settled']:.1f}",
                f"{100 * steps['fixed_point']:.1f}",
                f"{steps['fixed_point_steps']:.1f}",
                f"{steps['fixed_point_accuracy']:.2f}",
                ranks or "-",
            )
        )
    columns = (
        *(
            "seed",
            "tolerance chosen",
            "mean replays",
            "settled, %",
            "settled to 1e-3, %",
            "mean replays to 1e-3",
        ),
        *("accuracy there, %", "rank correlation of replays with"),
    )
    return Table(f"{task.title}: how the wormhole settles (every sample open)", columns, rows)


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """What was to be reached, and what was, on the tasks that were run."""
    asked = {cell["options"]["task"] for cell in cells}
    makers = {"cued_digits": _clutter_claims, "fashion_mnist": _fashion_claims}
    found: list[Claim] = []
    for task, make in makers.items():
        if task in asked:
            found += make(runs_of(cells, task))
    return found


def _verdict(differences: Sequence[float], least: float | None) -> str:
    """Whether a mean difference is at least so large: in part where the interval reaches below it.

    "-" where nothing was to be reached.
    """
    if len(differences) < 2:
        return "not measured"
    if least is None:
        return "-"
    middle, half = interval(differences)
    if middle < least:
        return "no"
    return "yes" if middle - half >= least else "in part"


def _against(runs: Runs, arm: str, state: str, words: str, target: str, least: float | None) -> Claim:
    ours, theirs = tested(runs, "wormhole", state), tested(runs, arm)
    differences = paired(ours, theirs)
    costs = pick(runs, "wormhole", *(("gated", "cost") if state == "gated" else ("open_cost",)))
    cost = ""
    if costs and "plain" in runs and arm in runs:
        base = mean(pick(runs, "plain", "cost"))
        mine, other = mean(costs) / base, mean(pick(runs, arm, "cost")) / base
        cost = f"at {mine:.2f}x the plain backbone's multiply-adds; theirs {other:.2f}x"
    return Claim(
        words,
        shown(list(theirs.values())) + " %" if theirs else "-",
        shown(list(ours.values())) + f" % {cost}" if ours else "-",
        compared(differences) + (" points" if differences else ""),
        target,
        _verdict(differences, least),
    )


def _clutter_claims(runs: Runs) -> list[Claim]:
    titles = {
        "plain": "the plain backbone of equal parameters",
        "longer": "the same trained longer",
        "wider": "a wider one",
        "deeper": "a deeper one, of three times its parameters",
    }
    made = [
        _against(
            runs,
            arm,
            "gated",
            f"Marked digits in clutter: gated wormhole against {words}",
            f"ahead by {CLEARLY:g} point" if arm != "deeper" else "none: for comparison",
            CLEARLY if arm != "deeper" else None,
        )
        for arm, words in titles.items()
    ]
    return [*made, *_gate_claims(runs, "Marked digits in clutter")]


def _fashion_claims(runs: Runs) -> list[Claim]:
    made = [
        _against(
            runs,
            "longer",
            "gated",
            "Fashion-MNIST: gated wormhole against the plain backbone of equal training compute",
            "within 0.3 points",
            -PARITY,
        ),
        _against(
            runs,
            "longer",
            "gated",
            "Fashion-MNIST: the same, as a gain",
            "+0.3 points",
            AIM,
        ),
        _cost_claim(runs),
    ]
    return [*made, *_gate_claims(runs, "Fashion-MNIST")]


def _cost_claim(runs: Runs) -> Claim:
    costs, base = pick(runs, "wormhole", "gated", "cost"), pick(runs, "wormhole", "cost")
    ratios = [a / b for a, b in zip(costs, base, strict=True)]
    met = "not measured" if not ratios else ("yes" if mean(ratios) <= COST else "no")
    words = "Fashion-MNIST: multiply-adds of the gated wormhole over the plain backbone's"
    return Claim(words, "1", shown(ratios), shown(ratios) + "x" if ratios else "-", f"at most {COST}x", met)


def _gate_claims(runs: Runs, title: str) -> list[Claim]:
    data = list(runs.get("wormhole", {}).values())
    gains = [d["gated"]["accuracy"] - d["gated"]["random"] for d in data]
    misses, followed, arriving = (
        [100 * (d["gated"][got] - d["gated"]["wanted"]) for d in data]
        for got in ("share", "followed", "arriving")
    )
    shares = sorted({100 * d["gated"]["wanted"] for d in data})
    wanted = f"{shares[0]:.0f}" + (f" to {shares[-1]:.0f}" if len(shares) > 1 else "") if shares else "-"

    def share(name: str, got: str, off: list[float]) -> Claim:
        hit = "not measured" if not data else ("yes" if max(map(abs, off)) <= SHARE_MARGIN else "no")
        return Claim(
            f"{title}: open share on {name}",
            f"{wanted} %" if data else "-",
            shown([100 * d["gated"][got] for d in data], 1) + " %" if data else "-",
            shown(off, 1) + " points off" if data else "-",
            f"within {SHARE_MARGIN:.0f} points, every seed",
            hit,
        )

    return [
        Claim(
            f"{title}: the gate against a random gate of equal share",
            shown([d["gated"]["random"] for d in data]) + " %" if data else "-",
            shown([d["gated"]["accuracy"] for d in data]) + " %" if data else "-",
            compared(gains) + (" points" if gains else ""),
            f"+{GATE_MARGIN} points",
            _verdict(gains, GATE_MARGIN),
        ),
        share("test data, threshold from validation data", "share", misses),
        share("half of the test data, threshold from the other half, no labels", "followed", followed),
        share("test data as they arrive, no labels, `follow`", "arriving", arriving),
    ]
