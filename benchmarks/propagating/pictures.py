"""The plots of ``propagation``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from zoo.data.planar import planar

from ..solving.pictures import save
from .nets import KINDS
from .phase import NUMBERS, unpacked
from .report import data_of, learned

__all__ = ["plots"]

FEATURES = ("#1f6f8b", "#d9822b", "#c9a800")  # blue, orange, yellow: the poster's
COLOURS = dict(zip(KINDS, ("#b2582a", "#e0a16d", "#7a5195", "#3aa675", "#1f6f8b"), strict=True))
CLASSES = ("#3b6fb6", "#e3873c", "#4aa564", "#b8485a", "#8c6bb1")
NOT_FINITE = "#222222"


def plots(cells: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Every plot that there are cells for."""
    made = []
    if data_of(cells, "figure2"):
        made.append(_figure2(cells, folder / "figure2.png"))
    if data_of(cells, "figure3"):
        made.append(_figure3(cells, folder / "figure3.png"))
    if learned(cells):
        made += [_depth(cells, folder / "depth.png"), _gradients(cells, folder / "gradients.png")]
        made.append(_regions(cells, folder / "regions.png"))
    return made


def _points(text: str) -> np.ndarray:
    """(layers + 1, 2) from a path."""
    return np.asarray(unpacked(text)).reshape(-1, 2)


def _figure2(cells: list[dict[str, Any]], path: Path) -> Path:
    """The poster's six panels, in its convention; paths thin, the state at the last layer a dot."""
    records = {
        r["panel"]: r
        for r in data_of(cells, "figure2")[0]["data"]["panels"]
        if r["convention"] == "Y K" and r["panel"] != "-"
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 6))
    for axis, (panel, title) in zip(
        axes.flat, [("a", "start"), *((p, records[p]["operator"]) for p in sorted(records))], strict=True
    ):
        for index, colour in enumerate(FEATURES):
            steps = _points(records[panel if panel != "a" else "b"]["paths"][index])
            if panel == "a":
                steps = steps[:1]
            axis.plot(steps[:, 0], steps[:, 1], color=colour, lw=0.9, alpha=0.7, marker=".", ms=2)
            axis.plot(*steps[-1], color=colour, marker="o", ms=7, ls="", label=f"y{index + 1}")
        reach = 2.8 if panel == "b" else 0.75
        _plane(axis, reach, f"({panel}) {title}" + ("" if panel == "a" else ", layer 21"))
    axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    return save(figure, path)


def _plane(axis: Any, reach: float, title: str) -> None:
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-reach, reach)
    axis.set_aspect("equal")
    axis.axhline(0, color="black", lw=0.4)
    axis.axvline(0, color="black", lw=0.4)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=7)


def _figure3(cells: list[dict[str, Any]], path: Path) -> Path:
    """One row for each reading of the start, a panel for each number of layers."""
    records = data_of(cells, "figure3")[0]["data"]["readings"]
    figure, axes = plt.subplots(len(records), len(NUMBERS), figsize=(13, 2.4 * len(records)), squeeze=False)
    for row, record in zip(axes, records, strict=True):
        plane = "y" if record["reading"].endswith("y") else "z"
        for axis, n in zip(row, NUMBERS, strict=True):
            for text, colour in zip(record["paths"], FEATURES, strict=True):
                steps = _points(text)[: n + 1]
                axis.plot(steps[:, 0], steps[:, 1], color=colour, lw=0.4 if n > 100 else 0.9, alpha=0.8)
                axis.plot(*steps[-1], color=colour, marker="o", ms=4, ls="")
            _plane(axis, 0.6, f"N = {n}")
        row[0].set_ylabel(f"{record['reading']}\n{plane}1, {plane}2", fontsize=8)
    marks = [plt.Line2D([], [], color=c, marker="o", label=f"y{k + 1}") for k, c in enumerate(FEATURES)]
    axes[0, 0].legend(handles=marks, fontsize=7, loc="lower left")
    figure.tight_layout()
    return save(figure, path)


def _panels(cells: list[dict[str, Any]], height: float) -> tuple[Any, dict[str, Any]]:
    """A panel for each set."""
    names = list(dict.fromkeys(name for name, _, _ in learned(cells)))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), height), squeeze=False)
    return figure, dict(zip(names, axes[0], strict=True))


def _legend(figure: Any, axes: dict[str, Any], columns: int) -> None:
    known = {
        label: handle
        for axis in axes.values()
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(
        known.values(), known.keys(), loc="upper center", ncol=columns, fontsize=8, bbox_to_anchor=(0.5, 0.0)
    )


def _depth(cells: list[dict[str, Any]], path: Path) -> Path:
    """Test accuracy against depth: means, and every seed as a dot."""
    found = learned(cells)
    figure, axes = _panels(cells, 3.2)
    for name, axis in axes.items():
        depths = sorted({d for n, _, d in found if n == name})
        for place, kind in enumerate(KINDS):
            mine = [(d, found[name, kind, d]) for d in depths if (name, kind, d) in found]
            shift = 1 + 0.035 * (place - 2)  # so that dots of different kinds lie side by side
            for d, data in mine:
                tests = [100 * run["test"] for run in data["runs"]]
                axis.plot([d * shift] * len(tests), tests, color=COLOURS[kind], marker=".", ms=4, ls="")
            means = [100 * np.mean([run["test"] for run in data["runs"]]) for _, data in mine]
            axis.plot([d * shift for d, _ in mine], means, color=COLOURS[kind], lw=1.4, label=kind)
        axis.set_xscale("log")
        axis.set_xticks(depths, [str(d) for d in depths])
        axis.set_xticks([], minor=True)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("layers", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.5)
    next(iter(axes.values())).set_ylabel("test accuracy, %", fontsize=8)
    _legend(figure, axes, len(KINDS))
    return save(figure, path)


def _gradients(cells: list[dict[str, Any]], path: Path) -> Path:
    """Gradient norms over the layers of the deepest networks: before training dashed, after it solid."""
    found = learned(cells)
    figure, axes = _panels(cells, 3.2)
    for name, axis in axes.items():
        deepest = max(d for n, _, d in found if n == name)
        for kind in KINDS:
            data = found.get((name, kind, deepest))
            if data is None:
                continue
            for when, dash in (("gradient_start", "--"), ("gradient_end", "-")):
                log = np.asarray(unpacked(data[when]["log10"]))
                log = np.where(np.isfinite(log), log, np.nan)
                layers = np.linspace(0, deepest, len(log))
                label = kind if dash == "-" else None
                axis.plot(layers, log - log[-1], color=COLOURS[kind], ls=dash, lw=1.2, label=label)
        axis.set_title(f"{name}, {deepest} layers", fontsize=10)
        axis.set_xlabel("layer (dashed: before training)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.5)
    next(iter(axes.values())).set_ylabel("log10 of gradient norm / last layer's", fontsize=8)
    _legend(figure, axes, len(KINDS))
    return save(figure, path)


def _regions(cells: list[dict[str, Any]], path: Path) -> Path:
    """Decision regions at the depths that were drawn: rows are sets and depths, columns the kinds."""
    drawn = {key: data for key, data in learned(cells).items() if data["regions"]}
    rows = list(dict.fromkeys((name, depth) for name, _, depth in drawn))
    figure, axes = plt.subplots(
        max(1, len(rows)), len(KINDS), figsize=(2.1 * len(KINDS), 2.15 * max(1, len(rows))), squeeze=False
    )
    colours = ListedColormap([*CLASSES, NOT_FINITE])
    for row, (name, depth) in zip(axes, rows, strict=False):
        data = planar(name, train=300, val=1, test=1)
        box = data.box
        for axis, kind in zip(row, KINDS, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if axis in axes[0]:
                axis.set_title(kind, fontsize=9)
            found = drawn.get((name, kind, depth))
            if found is None:
                continue
            grid = np.asarray([[int(c) for c in line] for line in found["regions"]])
            grid = np.where(grid == 9, len(CLASSES), grid)
            axis.imshow(grid, origin="lower", extent=(-box, box, -box, box), cmap=colours, vmin=0, vmax=5)
            x, y = data.train.points.T
            shades = [CLASSES[label] for label in data.train.labels.tolist()]
            axis.scatter(x, y, c=shades, s=3, edgecolors="white", linewidths=0.2)
            axis.set_xlabel(f"{100 * found['runs'][0]['test']:.1f} %", fontsize=8, labelpad=1)
        row[0].set_ylabel(f"{name}, {depth} layers", fontsize=8)
    figure.tight_layout(pad=0.4)
    return save(figure, path)
