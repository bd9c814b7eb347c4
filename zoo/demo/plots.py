"""The demo's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .swap import Samples

__all__ = ["plot_curve", "plot_histogram", "plot_images", "plot_strings", "plot_traces"]

_NATIVE = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97", "#c77d0a")
_BRIDGED = ("#8a8a8a", "#b0a08a", "#6f7f8f", "#a98fb0")
_MARKERS = "osD^v<>P"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def plot_traces(traces: dict[str, list[float]], tol: float, floor: float, path: Path) -> None:
    """Residual against evaluation, a line a solver; torchdeq's dashed. Solved to ``floor``."""
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    colours = {True: iter(_BRIDGED), False: iter(_NATIVE)}
    for index, (name, residuals) in enumerate(traces.items()):
        bridged = name.startswith("torchdeq.")
        axes.semilogy(
            range(1, len(residuals) + 1),
            residuals,
            linestyle="--" if bridged else "-",
            color=next(colours[bridged], "#444444"),
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.4 if bridged else 2.0,
            label=name,
        )
    axes.axhline(tol, color="black", linewidth=0.8, linestyle=":")
    axes.text(
        0.995, tol, f"tolerance {tol:g} ", va="bottom", ha="right", transform=axes.get_yaxis_transform()
    )
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("evaluation of the span")
    axes.set_ylabel("median relative residual, open test images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("How the trained wormhole settles under each solver")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_histogram(found: Samples, path: Path) -> None:
    """How many test images took how many steps."""
    counts = torch.bincount(found.steps)
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.subplots()
    colours = ["#9aa5b1" if step == 0 else "#1b6ca8" for step in range(len(counts))]
    bars = axes.bar(range(len(counts)), counts.tolist(), color=colours)
    axes.bar_label(bars, labels=[str(c) if c else "" for c in counts.tolist()], fontsize=8)
    axes.set_xlabel("steps to settle (0: the gate stayed closed, nothing was iterated)")
    axes.set_ylabel("test images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Computation follows the input")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_images(found: Samples, path: Path, each: int = 10) -> None:
    """The easiest and the hardest test images, by steps, then by the gate's probability."""
    order = torch.argsort(found.steps.double() + found.probability.double().clamp(0, 0.999))
    figure = Figure(figsize=(1.05 * each, 3.4))
    grid = figure.subplots(2, each)
    for row, (title, indices) in enumerate((("easiest", order[:each]), ("hardest", order[-each:].flip(0)))):
        for column, index in enumerate(indices.tolist()):
            axes = grid[row][column]
            axes.imshow(found.images[index, 0].numpy(), cmap="gray_r")
            axes.set_xticks([])
            axes.set_yticks([])
            wrong = "" if bool(found.correct[index]) else ", wrong"
            axes.set_xlabel(
                f"{int(found.steps[index])} steps{wrong}", fontsize=8, color="#b00020" if wrong else "black"
            )
            axes.set_title(str(int(found.labels[index])), fontsize=9)
        grid[row][0].set_ylabel(title, fontsize=10)
    figure.suptitle("Test images the wormhole network found easiest and hardest (label above, steps below)")
    figure.tight_layout()
    _save(figure, path)


def plot_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of images iterated, as the threshold moves."""
    figure = Figure(figsize=(7.2, 3.6))
    axes = figure.subplots()
    share = [100 * row["open_share"] for row in rows]
    axes.plot(share, [100 * row["accuracy"] for row in rows], marker="o", color="#1b6ca8")
    for index, (x, row) in enumerate(zip(share, rows, strict=True)):
        axes.annotate(
            f"{row['rows_evaluated']:,} rows",
            (x, 100 * row["accuracy"]),
            textcoords="offset points",
            xytext=(0, 8 if index % 2 else -14),
            ha="center",
            fontsize=7,
        )
    accuracies = [100 * row["accuracy"] for row in rows]
    axes.set_ylim(min(accuracies) - 1, min(max(accuracies) + 1, 100.2))  # a point or less is noise here
    axes.set_xlabel("images iterated, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("The share of images that think longer is a setting (gate threshold, after training)")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_strings(found: dict[str, Any], path: Path) -> None:
    """Steps against the length of the strings, and how many strings both nets read without a mistake."""
    rows = found["rows"]
    bits = [row["bits"] for row in rows]
    figure = Figure(figsize=(9.6, 3.8))
    left, right = figure.subplots(1, 2)
    steps = [row["wormhole"] for row in rows]
    left.fill_between(
        bits,
        [s["least_steps"] for s in steps],
        [s["most_steps"] for s in steps],
        color="#1b6ca8",
        alpha=0.2,
        label="fewest to most",
    )
    left.plot(bits, [s["mean_steps"] for s in steps], marker="o", color="#1b6ca8", label="mean")
    left.set_ylabel("steps until settled")
    left.set_title("Longer strings take more steps")
    left.legend(fontsize=8, frameon=False)
    for name, label, colour in (
        ("wormhole", "wormhole net", "#1b6ca8"),
        ("feed_forward", "feed-forward net", "#8a8a8a"),
    ):
        right.plot(bits, [100 * row[name]["right"] for row in rows], marker="o", color=colour, label=label)
    right.axvline(found["trained_on"], color="black", linewidth=0.8, linestyle=":")
    right.text(found["trained_on"], 50, " trained on", fontsize=8)
    right.set_ylabel("strings entirely right, %")
    right.set_ylim(-5, 105)
    right.set_title("What was learnt holds beyond the training")
    right.legend(fontsize=8, frameon=False, loc="center right")
    for axes in (left, right):
        axes.set_xlabel("bits")
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, [str(b) for b in bits])
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)
