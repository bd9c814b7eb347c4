"""The plots of ``wormholes``: accuracy against cost, accuracy against difficulty's proxy, steps, samples."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..solving.pictures import save
from .report import Runs, pick, runs_of, tested
from .tasks import TASKS, Task, parts

__all__ = ["plots"]

COLOURS = {
    "plain": "#555555",
    "longer": "#8d5a97",
    "wider": "#b2582a",
    "deeper": "#c79a2b",
    "wormhole": "#1f6f8b",
}
MARKERS = {"plain": "o", "longer": "s", "wider": "^", "deeper": "D", "wormhole": "o"}


def plots(cells: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Accuracy against cost and the steps, for each task that has runs; samples of the clutter."""
    made = []
    for task in TASKS.values():
        runs = runs_of(cells, task.name)
        if runs:
            made.append(_cost(task, runs, folder / f"{task.name}_cost.png"))
        if "wormhole" in runs:
            made.append(_steps(task, runs, folder / f"{task.name}_steps.png"))
    if any(cell["options"]["task"] == "cued_digits" for cell in cells):
        made.append(_samples(folder / "cued_digits_samples.png"))
    return made


def _cost(task: Task, runs: Runs, path: Path) -> Path:
    """Accuracy against multiply-adds: controls as points, the wormhole as a curve over its open share."""
    figure, axis = plt.subplots(figsize=(6.4, 5.2))
    base = mean(pick(runs, "wormhole" if "wormhole" in runs else next(iter(runs)), "cost"))
    for arm in task.arms:
        if arm.name in runs and arm.opening is None:
            values = list(tested(runs, arm.name).values())
            cost = mean(pick(runs, arm.name, "cost")) / base
            _bar(
                axis,
                cost,
                values,
                arm.name,
                f"{arm.title} ({pick(runs, arm.name, 'parameters')[0]:,} parameters)",
            )
    if "wormhole" in runs:
        _curve(axis, runs, base)
    axis.set_xlabel("multiply-adds a sample in use, over those of the plain backbone")
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"{task.title} ({len(next(iter(runs.values())))} seeds; bars: range)", fontsize=10)
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def _bar(axis: Any, x: float, values: list[float], name: str, label: str | None) -> None:
    middle = mean(values)
    axis.errorbar(
        x,
        middle,
        yerr=[[middle - min(values)], [max(values) - middle]],
        color=COLOURS[name],
        marker=MARKERS[name],
        capsize=2,
        lw=1,
        ls="",
        label=label,
    )


def _curve(axis: Any, runs: Runs, base: float) -> None:
    data = list(runs["wormhole"].values())
    kind = max(data[0]["gates"], key=lambda k: sum(d["gates"][k]["val_accuracy"] for d in data))
    closed = mean(d["test"]["closed"] for d in data)
    curves = [d["gates"][kind]["curve"] for d in data]
    ends = mean(d["open_cost"] for d in data) / base, mean(d["test"]["open"] for d in data)
    x = [1.0, *(mean(p["cost"] for p in points) / base for points in zip(*curves, strict=True)), ends[0]]
    for field, style, label in (
        (
            "accuracy",
            "-",
            f"wormhole, opened by {kind} ({pick(runs, 'wormhole', 'parameters')[0]:,} parameters)",
        ),
        ("random", ":", "wormhole, opened at random"),
    ):
        y = [closed, *(mean(p[field] for p in points) for points in zip(*curves, strict=True)), ends[1]]
        axis.plot(x, y, style, color=COLOURS["wormhole"], lw=1.6, label=label)
    _bar(
        axis,
        mean(pick(runs, "wormhole", "gated", "cost")) / base,
        list(tested(runs, "wormhole", "gated").values()),
        "wormhole",
        "wormhole at the share that was asked for",
    )
    _bar(axis, ends[0], list(tested(runs, "wormhole", "open").values()), "wormhole", None)


def _steps(task: Task, runs: Runs, path: Path) -> Path:
    """How many samples take how many replays, with every sample open and with the gate."""
    figure, axis = plt.subplots(figsize=(5.4, 3.2))
    data = list(runs["wormhole"].values())
    for offset, (field, label, colour) in enumerate(
        (
            ("histogram", "every sample open", "#9aa5b1"),
            ("histogram_gated", "with the gate", COLOURS["wormhole"]),
        )
    ):
        counts = [sum(column) for column in zip(*(d["steps"][field] for d in data), strict=True)]
        shares = [100 * count / sum(counts) for count in counts]
        axis.bar([i + 0.4 * offset - 0.2 for i in range(len(shares))], shares, 0.4, label=label, color=colour)
    axis.set_xlabel("replays of the span (0: closed)")
    axis.set_ylabel("test samples, %")
    axis.set_title(f"{task.title}: replays, all seeds", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def _samples(path: Path) -> Path:
    """The first validation images of the clutter task, with labels."""
    part = parts("cued_digits", None, 1024, True)["val"]
    figure, axes = plt.subplots(2, 10, figsize=(9, 2.2))
    for index, axis in enumerate(axes.flat):
        axis.imshow(part.images[index, 0].numpy(), cmap="gray")
        axis.set_title(f"{int(part.labels[index])}", fontsize=8)
        axis.axis("off")
    figure.suptitle("cued_digits: the label is the digit level with the mark", fontsize=9, y=1.04)
    return save(figure, path)
