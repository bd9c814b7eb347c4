"""The plots of ``models``: accuracy against cost, and against training time."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..solving.pictures import readable_log, save
from .arms import ARMS
from .report import Found, datasets, found_on

__all__ = ["plots"]

COLOURS = {
    "plain": "#555555",
    "longer": "#999999",
    "wider": "#222222",
    "twnn": "#1f6f8b",
    "dynalay": "#6fb08b",
    "cnn3": "#b0a070",
    "hamiltonian": "#8a4f9e",
    "deq": "#b2582a",
    "deq_anderson": "#d08a5a",
    "deq_broyden": "#e0b08a",
    "deq_phantom": "#c03030",
    "deq_unrolled": "#e07070",
    "deq_ours": "#3060c0",
    "resnet36": "#c8a0c8",
    "resnet50": "#a070a0",
}


def plots(cells: list[dict[str, Any]], folder: Path) -> list[Path]:
    """One picture a data set and precision."""
    made = []
    for dataset, precision in datasets(cells):
        found = found_on(cells, dataset, precision)
        short = "" if precision == "float32" else "_bf16"
        made.append(_picture(found, folder / f"{dataset}{short}.png"))
    return made


def _picture(found: Found, path: Path) -> Path:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    titles = {arm.name: arm.title for arm in ARMS}
    for name, colour in COLOURS.items():
        data = list(found.get(name, {}).values())
        if not data:
            continue
        short = data[0]["share"] < 1
        marker = "x" if short else "o"
        label = titles[name] + (" *" if short else "")
        cost = [d["test"]["multiply_adds"] / 1e6 for d in data]
        axes[0].plot(
            cost, [d["test"]["accuracy"] for d in data], marker, color=colour, ms=4, ls="", label=label
        )
        if data[0]["curve"]:
            points = list(zip(*(d["curve"] for d in data), strict=True))
            costs = [mean(p["multiply_adds"] for p in at) / 1e6 for at in points]
            axes[0].plot(costs, [mean(p["accuracy"] for p in at) for at in points], color=colour, lw=1)
        for index, d in enumerate(data):
            curve = d["training"]["curve"]
            style = {"color": colour, "lw": 1.2 if index == 0 else 0.6, "alpha": 1.0 if index == 0 else 0.5}
            heights = [100 * point[-1] for point in curve]
            axes[1].plot([sum(point[1:4]) for point in curve], heights, **style)
            axes[2].plot([point[4] / 1e12 for point in curve], heights, **style)
    low = min(
        (d["test"]["accuracy"] for by in found.values() for d in by.values() if d["share"] >= 1), default=0
    )
    for axis in axes:
        axis.set_xscale("log")
        readable_log(axis.xaxis)
        axis.set_ylim(bottom=max(0.0, low - 8))
        axis.grid(alpha=0.25, lw=0.5)
        axis.tick_params(labelsize=7)
    axes[0].set_xlabel("million multiply-adds an image", fontsize=8)
    axes[1].set_xlabel("seconds of training", fontsize=8)
    axes[2].set_xlabel("multiply-adds of training, 10$^{12}$", fontsize=8)
    axes[0].set_ylabel("test accuracy, %", fontsize=8)
    axes[1].set_ylabel("validation accuracy, %", fontsize=8)
    axes[0].set_title("gate, penalty or iterations moved: one line", fontsize=9)
    axes[1].set_title("training time", fontsize=9)
    axes[2].set_title("training work", fontsize=9)
    figure.legend(loc="upper center", ncol=4, fontsize=7, bbox_to_anchor=(0.5, 0.0))
    figure.tight_layout()
    return save(figure, path)
