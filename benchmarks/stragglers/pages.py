"""Tables, plots and claims of ``scaling``, and its part of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..harness import Claim, Table
from ..solving.pictures import save

__all__ = ["capped", "claims", "lost", "plot_lost", "plot_steps", "recorded", "remedies"]

WORDS = {"rows": "rows paid one by one", "launches": "launches paid"}


def _good(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["status"] == "ok"]


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.1f} %" if abs(value) >= 5e-4 else "0.0 %"


def _steps(cell: dict[str, Any]) -> np.ndarray:
    return np.array([int(s) for s in cell["data"]["steps"].split()])


def recorded(cells: list[dict[str, Any]]) -> Table:
    """What was recorded."""
    rows = []
    for cell in _good(cells):
        data, steps = cell["data"], _steps(cell)
        quantiles = np.quantile(steps, (0.5, 0.9, 0.99, 1)).astype(int)
        forecast = [data["forecast"][name] for name in ("gate", "previous epoch")]
        rows.append(
            (
                cell["key"],
                data["dataset"],
                _percent(data["accuracy"]),
                str(steps.size),
                _percent(float((steps > 0).mean())),
                f"{steps.mean():.2f}",
                " / ".join(map(str, quantiles)),
                f"{data['outside']:.2f}",
                " / ".join("n/a" if f is None else f"{f:.2f}" for f in forecast),
            )
        )
    columns = (
        *("network", "data", "accuracy", "samples", "iterated", "mean steps", "median / 90 / 99 % / most"),
        *("open-loop pass, replays", "correlation: gate / previous epoch"),
    )
    notes = (
        "Steps of training samples in eval mode after the last epoch; samples that are closed take none.",
    )
    return Table("Recorded steps", columns, rows, notes)


def lost(cells: list[dict[str, Any]]) -> Table:
    """Share of time lost, rows as they come."""
    rows = []
    for cell in _good(cells):
        plain = cell["data"]["plain"]
        ranks = sorted({p["ranks"] for p in plain})
        for cost in WORDS:
            for batch in sorted({p["batch"] for p in plain}):
                mine = {p["ranks"]: p for p in plain if (p["cost"], p["batch"]) == (cost, batch)}
                rows.append(
                    (cell["key"], WORDS[cost], str(batch), *(_percent(mine[n]["lost"]) for n in ranks))
                )
    ranks = sorted({p["ranks"] for cell in _good(cells) for p in cell["data"]["plain"]})
    notes = ("Share of an update in which the mean process waits for the slowest.",)
    return Table(
        "Lost to stragglers, rows as they come",
        ("network", "cost of a batch", "batch", *(f"{n} rank(s)" for n in ranks)),
        rows,
        notes,
    )


def _baseline(cell: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    keys = ("ranks", "batch", "cost")
    return next(p for p in cell["data"]["plain"] if all(p[key] == like[key] for key in keys))


def remedies(cells: list[dict[str, Any]]) -> Table:
    """Time of an update against that of rows as they come."""
    rows = []
    ranks: list[int] = []
    for cell in _good(cells):
        found = cell["data"]["remedies"]
        ranks = sorted({p["ranks"] for p in found})
        for cost in WORDS:
            for plan, predictor in dict.fromkeys((p["plan"], p["predictor"]) for p in found):
                mine = [p for p in found if (p["cost"], p["plan"], p["predictor"]) == (cost, plan, predictor)]
                ratios = {p["ranks"]: _baseline(cell, p)["time"] / p["time"] for p in mine}
                rows.append((cell["key"], WORDS[cost], plan, predictor, *(f"{ratios[n]:.2f}" for n in ranks)))
    notes = (
        "How many times faster an update is than with rows as they come; means over updates. Dealt: the rows "
        "of each update in the order of the forecast, dealt to and fro. Bucketed: those of 64 updates in "
        "that order, cut into updates of like rows.",
    )
    columns = ("network", "cost", "plan", "forecast", *(f"{n} rank(s)" for n in ranks))
    return Table("What helps", columns, rows, notes, long=True)


def capped(cells: list[dict[str, Any]]) -> Table:
    """The same for a cap on the steps."""
    rows = []
    ranks: list[int] = []
    for cell in _good(cells):
        found = cell["data"]["caps"]
        ranks = sorted({p["ranks"] for p in found})
        for cost in WORDS:
            for cap in sorted({p["cap"] for p in found}):
                mine = {p["ranks"]: p for p in found if (p["cost"], p["cap"]) == (cost, cap)}
                share = _percent(cell["data"]["capped_share"][str(cap)])
                ratios = (f"{_baseline(cell, mine[n])['time'] / mine[n]['time']:.2f}" for n in ranks)
                rows.append((cell["key"], WORDS[cost], str(cap), share, *ratios))
    columns = ("network", "cost", "max_iter", "samples cut off", *(f"{n} rank(s)" for n in ranks))
    return Table("A cap on the steps", columns, rows, ("Times faster than without the cap.",), long=True)


def plot_lost(cells: list[dict[str, Any]], path: Path) -> Path:
    """Share lost against the number of processes."""
    good = _good(cells)
    figure, axes = plt.subplots(
        1, max(1, len(good)), figsize=(4.6 * max(1, len(good)), 3.4), squeeze=False, sharey=True
    )
    for axis, cell in zip(axes[0], good, strict=False):
        plain = cell["data"]["plain"]
        for cost, style in zip(WORDS, ("-", "--"), strict=True):
            for number, batch in enumerate(sorted({p["batch"] for p in plain})):
                mine = [p for p in plain if (p["cost"], p["batch"]) == (cost, batch)]
                axis.plot(
                    [p["ranks"] for p in mine],
                    [100 * p["lost"] for p in mine],
                    style,
                    marker="o",
                    ms=3,
                    color=plt.get_cmap("viridis")(0.15 + 0.22 * number),
                    label=f"batch {batch}, {WORDS[cost]}",
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks([p["ranks"] for p in mine], [str(p["ranks"]) for p in mine])
        axis.set_title(cell["key"], fontsize=9)
        axis.set_xlabel("processes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time lost to waiting, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncol=2, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return save(figure, path)


def plot_steps(cells: list[dict[str, Any]], path: Path) -> Path:
    """How many samples take how many steps."""
    figure, axis = plt.subplots(figsize=(5, 3))
    for cell in _good(cells):
        steps = _steps(cell)
        counts = np.bincount(steps, minlength=int(steps.max()) + 1) / steps.size
        axis.step(range(counts.size), 100 * counts, where="mid", label=cell["key"])
    axis.set_xlabel("steps of a sample")
    axis.set_ylabel("samples, %")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return save(figure, path)


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """One line a network and cost: what 1024 processes lose, and what the best honest forecast gives back."""
    made = []
    for cell in _good(cells):
        for cost, words in WORDS.items():
            plain = [p for p in cell["data"]["plain"] if p["cost"] == cost]
            most = max(p["ranks"] for p in plain)
            found = [
                p
                for p in cell["data"]["remedies"]
                if (p["cost"], p["ranks"]) == (cost, most) and p["predictor"] in ("gate", "previous epoch")
            ]
            best = min(found, key=lambda p: p["time"])
            base = _baseline(cell, best)
            made.append(
                Claim(
                    f"simulated stragglers, {cell['key']}, {words}, {most} ranks of {best['batch']}",
                    f"rows as they come: {_percent(base['lost'])} lost",
                    f"{best['plan']} by {best['predictor']}: {_percent(best['lost'])} lost",
                    f"{base['time'] / best['time']:.2f} times faster",
                    "reported",
                    "yes",
                )
            )
    return made
