"""The plots of ``solvers``: ratios with their targets, and work against precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .headline import PHASES, headlines, problems_of, targets_of

__all__ = ["ratios", "readable_log", "save", "work"]

COLOURS = {"torchdeq": "#b2582a", "ours": "#1f6f8b", "floor": "#555555"}


def save(figure: Any, path: Path) -> Path:
    """Write a figure as a small PNG and close it."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def readable_log(axis: Any) -> None:
    """Few, plain labels on a logarithmic axis: 1, 2, 5 within a decade or two, else powers of ten."""
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    if decades < 0.75:
        subs = tuple(float(n) for n in range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if value >= 0.01 else f"{value:.0e}")
    )
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=7)


_LABEL = 0.16  # width of a number beside its bar, in longest bars


def ratios(cells: list[dict[str, Any]], path: Path) -> Path:
    """Bars: torchdeq's fastest over our fastest, with quartiles, and a mark where the target lies."""
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.42 * max(len(headlines(cells)) // 2, 4) + 1.3), sharey=True
    )
    for axis, (phase, title) in zip(axes, PHASES.items(), strict=True):
        lines = [h for h in headlines(cells) if h.phase == phase]
        label = _LABEL * max((h.ratio or 0.0 for h in lines), default=0.0)
        for place, h in enumerate(lines):
            if h.ratio is None:
                axis.text(0.05, place, "no converged candidate on one side", va="center", fontsize=8)
                continue
            low, high = min(r["q1"] for r in h.ratios), max(r["q3"] for r in h.ratios)
            axis.barh(place, h.ratio, color=COLOURS["ours"], height=0.62)
            error = [[max(h.ratio - low, 0)], [max(high - h.ratio, 0)]]
            axis.errorbar(h.ratio, place, xerr=error, color="black", capsize=2, lw=1)
            target, end = targets_of(h.problem, cells)[1].get(phase), max(high, h.ratio)
            if target:
                axis.plot([target, target], [place - 0.42, place + 0.42], color="#c00000", lw=2)
                if end - 0.1 * label <= target <= end + label:  # the mark would cross the number out
                    end = target
            axis.text(end, place, f"  {h.ratio:.2f}", va="center", fontsize=8)
        names = [f"{h.problem}, {h.tol:.0e}{'' if h.precision == 'float32' else ' bf16'}" for h in lines]
        axis.set_yticks(range(len(lines)), names, fontsize=8)
        axis.axvline(1, color="black", lw=0.8, ls=":")
        axis.set_xlim(0, 1.15 * axis.get_xlim()[1])
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("torchdeq's fastest / ours, equal gradient error (red: target)", fontsize=8)
    return save(figure, path)


def work(cells: list[dict[str, Any]], path: Path) -> Path:
    """Time of forward and backward against the gradient's error, each converged candidate a point."""
    chosen = [
        cell
        for cell in problems_of(cells)
        if cell["options"]["seed"] == problems_of(cells)[0]["options"]["seed"]
    ]
    columns = min(3, max(1, len(chosen)))
    height = max(1, -(-len(chosen) // columns))
    figure, axes = plt.subplots(height, columns, figsize=(4.0 * columns, 3.1 * height), squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, cell in zip(axes.flat, chosen, strict=False):
        for comparison in cell["data"]["comparisons"]:
            floor = comparison["floor"]
            _point(axis, floor, "floor", "*", 90)
            for view, marker in (("equal tolerance", "o"), ("equal gradient error", "^")):
                for record in comparison["views"][view]:
                    if record["converged"]:
                        _point(axis, record, record["family"], marker, 22)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(cell["key"], fontsize=9)
        readable_log(axis.xaxis)
        readable_log(axis.yaxis)
        axis.grid(alpha=0.25, lw=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("forward + backward, ms", fontsize=8)
    for row in axes:
        row[0].set_ylabel("gradient error", fontsize=8)
    handles = [plt.Line2D([], [], color=c, marker="s", ls="", label=name) for name, c in COLOURS.items()]
    handles += [
        plt.Line2D([], [], color="grey", marker="o", ls="", label="equal tolerance"),
        plt.Line2D([], [], color="grey", marker="^", ls="", label="equal gradient error"),
    ]
    figure.legend(handles=handles, loc="upper center", ncol=5, fontsize=8, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    return save(figure, path)


def _point(axis: Any, record: dict[str, Any], family: str, marker: str, size: float) -> None:
    if record.get("total") and record["gradient_error"]:
        axis.scatter(
            1e3 * record["total"]["median"],
            record["gradient_error"],
            color=COLOURS[family],
            marker=marker,
            s=size,
            alpha=0.8,
            linewidths=0,
        )
