"""Tables and claims of ``sequences``, from the cells' data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..harness import Claim, Table
from .sine import TARGET

__all__ = ["chosen_rate", "claims", "contest_table", "contests", "sine_table", "waves"]

Cells = list[dict[str, Any]]
_METRIC = {"adding": "within 0.04", "copy": "symbols right"}


def finished(cells: Cells, kind: str) -> Cells:
    """The cells of one kind that did not fail."""
    return [cell for cell in cells if cell["options"]["kind"] == kind and cell["status"] == "ok"]


def spread(values: Sequence[float], form: str = "{:.3g}") -> str:
    """Median, and the range where there is one."""
    middle, low, high = (form.format(v) for v in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def waves(cells: Cells) -> dict[tuple[str, str], Cells]:
    """The runs of each adjoint and rate, one a seed."""
    found: dict[tuple[str, str], Cells] = {}
    for cell in finished(cells, "sine"):
        for rate, run in cell["data"]["runs"].items():
            found.setdefault((cell["options"]["adjoint"], rate), []).append(run)
    return found


def chosen_rate(cells: Cells, adjoint: str) -> str | None:
    """The rate with the lowest median training loss at the end, None without a run."""
    runs = {rate: found for (name, rate), found in waves(cells).items() if name == adjoint}
    return min(runs, key=lambda rate: median(run["last_loss"] for run in runs[rate]), default=None)


def sine_table(cells: Cells) -> Table:
    """Sine: each adjoint at each rate."""
    rows = []
    for (adjoint, rate), runs in waves(cells).items():
        reached = [run["reached"] for run in runs]
        rows.append(
            (
                adjoint,
                rate,
                spread([run["mse"] for run in runs], "{:.1e}"),
                f"{sum(value is not None for value in reached)} of {len(runs)}",
                spread([value for value in reached if value is not None], "{:.0f}") if any(reached) else "-",
                spread([run["steps"] for run in runs], "{:.1f}"),
                spread([run["products"] for run in runs], "{:.1f}"),
                str(sum(run["rows_not_converged"] for run in runs)),
            )
        )
    return Table(
        "Sine wave, algorithms 3 and 4 (task B)",
        (
            "adjoint",
            "learning rate",
            "MSE over the wave",
            f"below {TARGET:g}",
            "at update",
            "iterations of fix",
            "backward products",
            "solves not converged",
        ),
        rows,
        (
            "Median over seeds (range). Iterations and products are means over samples and updates; "
            "with unrolled the backward pass goes through the iterations instead. The paper's learning "
            "rate is 0.001; what it leaves open is listed in benchmarks/sequencing/sine.py.",
        ),
    )


def contests(cells: Cells) -> dict[tuple[str, int], dict[str, Cells]]:
    """Data of each task and length by contestant, one a seed."""
    found: dict[tuple[str, int], dict[str, Cells]] = {}
    for cell in finished(cells, "contest"):
        options = cell["options"]
        task = found.setdefault((options["task"], options["length"]), {})
        task.setdefault(options["name"], []).append(cell["data"])
    return found


def contest_table(cells: Cells) -> Table:
    """Long-range tasks: every contestant."""
    rows = []
    for (task, length), by_name in contests(cells).items():
        for name, runs in by_name.items():
            rows.append(
                (
                    f"{task} {length}",
                    name,
                    str(runs[0]["parameters"]),
                    spread([run["updates"] for run in runs], "{:.0f}"),
                    ", ".join(f"{run['rate']:g}" for run in runs),
                    spread([run["steps"] for run in runs], "{:.1f}") if runs[0]["steps"] else "-",
                    spread([run["test_loss"] for run in runs]),
                    f"{spread([100 * run['test_score'] for run in runs], '{:.1f}')} %",
                    f"{runs[0]['chance']:.3g}",
                )
            )
    return Table(
        "Long-range tasks, equal parameters and equal training compute",
        (
            "task",
            "network",
            "parameters",
            "updates",
            "rates chosen",
            "iterations",
            "test loss",
            "right",
            "loss by chance",
        ),
        rows,
        (
            "Median over seeds (range). Right: answers within 0.04 (adding), symbols (copy), images. All "
            "have spent the same multiply-adds when they stop, so that a network that iterates gets fewer "
            "updates; iterations of a wormhole through time are its windows, which cost one pass in all. "
            "The rate is the one with the lowest validation loss after a fifth of the budget, for each "
            "network and seed.",
        ),
    )


def claims(cells: Cells) -> list[Claim]:
    """Lines for the index page."""
    return [*_sine_claims(cells), *_contest_claims(cells)]


def _sine_claims(cells: Cells) -> list[Claim]:
    found = []
    for adjoint in dict.fromkeys(name for name, _ in waves(cells)):
        rate = chosen_rate(cells, adjoint)
        assert rate is not None
        runs = waves(cells)[adjoint, rate]
        worst = max(run["mse"] for run in runs)
        updates = runs[0]["updates"]
        found.append(
            Claim(
                f"Sine wave by algorithms 3 and 4, {adjoint}: MSE over the wave after {updates} updates",
                "figure 7, no number",
                f"{spread([run['mse'] for run in runs], '{:.1e}')} at learning rate {rate}",
                f"worst of {len(runs)} seeds {worst:.1e}",
                "below 1e-3 in at most 300",
                "yes" if worst < TARGET and updates <= 300 else "no",
            )
        )
    return found


def _contest_claims(cells: Cells) -> list[Claim]:
    found = []
    for (task, length), by_name in contests(cells).items():
        plain = {name: runs for name, runs in by_name.items() if "wormhole" not in name}
        for name, runs in by_name.items():
            if "wormhole" not in name or not plain:
                continue
            best = max(plain, key=lambda other: median(run["test_score"] for run in plain[other]))
            ours, theirs = ([100 * run["test_score"] for run in side] for side in (runs, plain[best]))
            gap = median(ours) - median(theirs)
            apart = min(ours) > max(theirs)
            found.append(
                Claim(
                    f"{task} {length}, {name}: {_METRIC.get(task, 'images right')}, equal size and compute",
                    f"{best}: {spread(theirs, '{:.1f}')} %",
                    f"{spread(ours, '{:.1f}')} %",
                    f"{gap:+.1f} points" if math.isfinite(gap) else "-",
                    "ahead of GRU and LSTM",
                    "yes" if apart else ("in part" if gap > 0 else "no"),
                )
            )
    return found
