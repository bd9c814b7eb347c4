"""Plots of ``reasoning``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

__all__ = ["iterations", "steps"]

Record = dict[str, Any]
_BLUE, _RED = "#1f6f8b", "#b2582a"
_MODELS = ("twnn_prefix", "twnn_maze")
_UNITS = {"twnn_prefix": "bits", "twnn_maze": "units along a side"}
_FOLLOWED = {"twnn_prefix": "ones", "twnn_maze": "dead_end"}
_WORDS = {"ones": "number of 1s", "dead_end": "depth of the deepest dead end, cells"}


def _done(cells: list[Record], kind: str, model: str) -> list[Record]:
    return [
        c
        for c in cells
        if c["status"] == "ok" and c["options"]["kind"] == kind and c["options"]["model"] == model
    ]


def steps(cells: list[Record], path: Path) -> Path | None:
    """Steps against size, and within one size against difficulty, for each model."""
    models = [model for model in _MODELS if _done(cells, "shipped", model)]
    if not models:
        return None
    figure, grid = plt.subplots(len(models), 2, figsize=(9, 3.4 * len(models)), squeeze=False)
    for (left, right), model in zip(grid, models, strict=True):
        found = sorted(_done(cells, "shipped", model), key=lambda c: c["options"]["size"])
        sizes = [c["options"]["size"] for c in found]
        left.fill_between(
            sizes,
            [c["data"]["least_steps"] for c in found],
            [c["data"]["most_steps"] for c in found],
            color=_BLUE,
            alpha=0.2,
            label="least to most",
        )
        left.loglog(sizes, [c["data"]["mean_steps"] for c in found], "o-", color=_BLUE, label="mean")
        left.set_xticks(sizes, [str(s) for s in sizes])
        left.xaxis.set_minor_locator(NullLocator())
        left.set_xlabel(f"size, {_UNITS[model]}")
        left.set_ylabel("steps until settled")
        left.legend(frameon=False, fontsize=8)
        left.set_title(model)
        scattered = max(
            (c for c in found if c["data"]["samples"] >= 20), key=lambda c: c["options"]["size"], default=None
        )
        if scattered is not None:
            name = _FOLLOWED[model]
            data = scattered["data"]
            right.scatter(data["difficulty"][name], data["steps"], s=8, color=_RED, alpha=0.6)
            rank = data["rank_correlation"][name]
            shown = "none: all took the same" if rank is None else f"{rank:.2f}"
            right.set_title(f"size {scattered['options']['size']}: rank correlation {shown}")
            right.set_xlabel(_WORDS[name])
    return _save(figure, path)


def iterations(cells: list[Record], path: Path) -> Path | None:
    """Share entirely right, and the largest change, against iterations."""
    found = [c for model in _MODELS for c in _done(cells, "dynamics", model)]
    if not found:
        return None
    figure, grid = plt.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False)
    for axes, cell in zip(grid[0], found, strict=True):
        o, d = cell["options"], cell["data"]
        axes.plot(d["iterations"], [100 * r for r in d["right"]], color=_BLUE, label="entirely right, %")
        axes.axvline(d["solver"]["mean_steps"], color="black", linestyle=":", linewidth=1)
        axes.text(d["solver"]["mean_steps"], 50, " solver stops (mean)", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("iterations")
        axes.set_ylabel("entirely right, %", color=_BLUE)
        axes.set_title(f"{o['model']}, size {o['size']}")
        other = axes.twinx()
        other.semilogy(d["iterations"], [max(c, 1e-8) for c in d["change"]], color=_RED, linewidth=1)
        other.set_ylabel("largest change anywhere", color=_RED)
    figure.tight_layout()
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
