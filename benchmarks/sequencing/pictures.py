"""The plots of ``sequences``: figure 7 redone, and learning curves."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..solving.pictures import readable_log, save
from .report import chosen_rate, contests, waves
from .sine import TARGET

__all__ = ["curves", "figure7"]

ADJOINT_STYLES = {  # they lie on top of each other for a while
    "ad_fixed_point": {"color": "#1f6f8b", "ls": "-"},
    "implicit": {"color": "#b2582a", "ls": "--"},
    "unrolled": {"color": "#555555", "ls": ":"},
}
COLOURS = {
    "GRU": "#555555",
    "LSTM": "#b0a070",
    "GRU, wormhole through time": "#1f6f8b",
    "GRU, wormhole of the copy's lag": "#6fb08b",
    "GRU, wormhole from the end": "#b2582a",
    "GRU, wormhole within the step": "#8a4f9e",
}


def figure7(cells: list[dict[str, Any]], path: Path) -> Path | None:
    """Gradient norm, loss and generated wave: each adjoint at its best rate, the first seed bold."""
    found = waves(cells)
    if not found:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.2))
    for adjoint, look in ADJOINT_STYLES.items():
        rate = chosen_rate(cells, adjoint)
        for index, run in enumerate(found.get((adjoint, rate), []) if rate else []):
            style = {**look, "lw": 1.6 if index == 0 else 0.6, "alpha": 1.0 if index == 0 else 0.5}
            label = f"{adjoint}, rate {rate}" if index == 0 else None
            updates = range(1, run["updates"] + 1, run["every"])
            axes[0].plot(updates, run["norms"], label=label, **style)
            axes[1].plot(updates, run["losses"], **style)
            if index == 0:
                axes[2].plot(run["wave"][0], run["wave"][2], **style)
                wave = run["wave"]
    axes[2].plot(wave[0], wave[1], color="black", lw=0.8, ls=":", label="target")
    axes[1].axhline(TARGET, color="#c00000", lw=0.8, label="to reach")
    for axis, title in zip(
        axes, ("norm of the gradient", "mean squared error", "generated wave"), strict=True
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update" if axis is not axes[2] else "time", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25, lw=0.5)
    for axis in axes[:2]:
        axis.set_yscale("log")
        readable_log(axis.yaxis)
    figure.tight_layout()
    return save(figure, path)


def curves(cells: list[dict[str, Any]], path: Path) -> Path | None:
    """Validation loss against the multiply-adds spent, every seed a line, the median's seed bold."""
    found = contests(cells)
    if not found:
        return None
    columns = min(3, len(found))
    height = -(-len(found) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.0 * columns, 2.9 * height), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, ((task, length), by_name) in zip(axes.flat, found.items(), strict=False):
        for name, runs in by_name.items():
            middle = median(run["test_loss"] for run in runs)
            bold = min(range(len(runs)), key=lambda i: abs(runs[i]["test_loss"] - middle))
            for index, run in enumerate(runs):
                points = [point[:2] for point in run["curve"]]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        color=COLOURS[name],
                        lw=1.6 if index == bold else 0.6,
                        alpha=1.0 if index == bold else 0.45,
                    )
        axis.axhline(next(iter(by_name.values()))[0]["chance"], color="black", lw=0.8, ls=":")
        axis.set_yscale("log")
        readable_log(axis.yaxis)
        axis.set_title(f"{task} {length}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, lw=0.5)
        axis.set_xlabel("share of the training compute", fontsize=8)
    for row in axes:
        row[0].set_ylabel("validation loss", fontsize=8)
    shown = [name for name in COLOURS if any(name in by_name for by_name in found.values())]
    handles = [plt.Line2D([], [], color=COLOURS[name], label=name) for name in shown]
    handles.append(plt.Line2D([], [], color="black", lw=0.8, ls=":", label="chance"))
    figure.legend(handles=handles, loc="upper center", ncol=3, fontsize=8, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    return save(figure, path)
