"""The plots of ``dynalay``: figures 2 to 7 of the paper, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..solving.pictures import save
from ..training.report import Runs, runs_of
from .tasks import TASKS, Task
from .text import TEXTS, VARIANTS

__all__ = ["plots"]

BLUE, RED, GREEN, GREY, GOLD = "#1f6f8b", "#b2582a", "#4f7f3a", "#555555", "#c79a2b"
CHOICES = (GREY, BLUE, RED, GOLD)


def plots(cells: list[dict[str, Any]], folder: Path) -> list[Path]:
    """For each data set with a finished DynaLay run: losses, choices, warm-up, agents, models, cost."""
    made = []
    for task in TASKS.values():
        runs = runs_of(cells, task.name)
        if "dynalay" not in runs:
            continue
        made += [
            _losses(task, runs, folder / f"{task.name}_loss.png"),
            _choices(task, runs, folder / f"{task.name}_choices.png"),
            _agents(task, runs, folder / f"{task.name}_agents.png"),
            _cost(task, runs, folder / f"{task.name}_cost.png"),
        ]
        if "model0" in runs:
            made.append(_models(task, runs, folder / f"{task.name}_models.png"))
    read = {text.name: runs for text in TEXTS.values() if (runs := runs_of(cells, text.name))}
    return [*made, _texts(read, folder / "texts.png")] if read else made


def _texts(read: dict[str, Runs], path: Path) -> Path:
    """Figure 7: an LSTM with one of its layers iterated, or all."""
    figure, axes = plt.subplots(1, len(read), figsize=(4.6 * len(read), 3.4), squeeze=False)
    for axis, (name, runs) in zip(axes[0], read.items(), strict=True):
        for place, variant in enumerate(VARIANTS):
            found = [data["test"] for data in runs.get(variant, {}).values()]
            axis.plot([place] * len(found), found, "o", color=BLUE, alpha=0.6)
            if found:
                axis.plot([place - 0.2, place + 0.2], [mean(found)] * 2, color=BLUE)
        measure = next(data["measure"] for runs_ in runs.values() for data in runs_.values())
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS))
        unit = ", %" if measure == "accuracy" else ""
        axis.set(ylabel=f"test {measure}{unit}", xlabel="iterated", title=f"Figure 7: {name}")
    figure.tight_layout()
    return save(figure, path)


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [mean(column) for column in zip(*rows, strict=True)]


def _losses(task: Task, runs: Runs, path: Path) -> Path:
    """Figures 2 and 4: loss and accuracy by epoch, with the warm-up and without."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for arm, name, colour in (
        ("dynalay", "with warm-up", BLUE),
        ("cold", "without warm-up", RED),
        ("model0", "three-layer CNN", GREY),
    ):
        curves = [data["curve"] for data in runs.get(arm, {}).values()]
        if not curves:
            continue
        epochs = range(1, len(curves[0]) + 1)
        axes[0].plot(epochs, _mean([[p["loss"] for p in c] for c in curves]), color=colour, label=name)
        axes[1].plot(epochs, _mean([[p["accuracy"] for p in c] for c in curves]), color=colour, label=name)
    axes[0].set(xlabel="epoch", ylabel="validation loss, nothing iterated", yscale="log")
    axes[1].set(xlabel="epoch", ylabel="validation accuracy, %")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Figures 2 and 4: {task.title}")
    figure.tight_layout()
    return save(figure, path)


def _choices(task: Task, runs: Runs, path: Path) -> Path:
    """Figure 3: how often each choice is made, the paper's figures beside ours."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    found = [data["test"]["agent"]["shares"] for data in runs["dynalay"].values()]
    names = ["NOP", *(f"layer {i + 1}" for i in range(len(found[0]) - 1))]
    middle = [100 * value for value in _mean(found)]
    low = [100 * min(column) for column in zip(*found, strict=True)]
    high = [100 * max(column) for column in zip(*found, strict=True)]
    errors = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    axis.bar(
        [i - 0.2 for i in range(len(names))], middle, 0.38, yerr=errors, color=BLUE, capsize=3, label="ours"
    )
    axis.bar([1.2, 2.2], [25, 20], 0.38, color=GOLD, label="paper (layers 1 and 2)")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="share of the choices, %", title=f"Figure 3: {task.title}")
    axis.legend(frameon=False)
    return save(figure, path)


def _agents(task: Task, runs: Runs, path: Path) -> Path:
    """Figure 5: the reward while the agent is taught, and choices and accuracy against the price."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.4))
    found = list(runs["dynalay"].values())
    for data in found:
        taught = data["betas"][data["chosen"]["agent"]]
        axes[0].plot(range(1, len(taught["reward"]) + 1), taught["reward"], color=BLUE, alpha=0.7)
    axes[0].set(xlabel="epoch of the agent", ylabel="mean reward against NOP", title="Figure 5a")
    places = range(len(found[0]["betas"]))
    names = ["NOP", *(f"layer {i}" for i in range(1, len(found[0]["betas"][0]["shares"])))]
    for choice, (name, colour) in enumerate(zip(names, CHOICES, strict=False)):
        shares = [100 * mean(d["betas"][p]["shares"][choice] for d in found) for p in places]
        axes[1].plot(places, shares, marker="o", ms=3, color=colour, label=name)
    twin = axes[1].twinx()
    accuracy = [mean(d["betas"][p]["accuracy"] for d in found) for p in places]
    twin.plot(places, accuracy, "--", color=GREEN, label="accuracy")
    twin.set_ylabel("validation accuracy, %")
    axes[1].set_xticks(places, [f"{entry['beta']:g}" for entry in found[0]["betas"]], fontsize=8)
    axes[1].set(xlabel="price of cost, beta", ylabel="share of the choices, %", title="Figure 5b")
    handles = [*axes[1].get_lines(), *twin.get_lines()]
    labels = [str(h.get_label()) for h in handles]
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(handles), loc="lower right")
    figure.suptitle(task.title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return save(figure, path)


def _cost(task: Task, runs: Runs, path: Path) -> Path:
    """Accuracy against multiply-adds: agent and entropy as curves, the others as points."""
    figure, axis = plt.subplots(figsize=(6.6, 4.4))
    found = list(runs["dynalay"].values())
    for data in found:
        curve = sorted((1 + p["cost"], p["accuracy"]) for p in data["entropy_curve"])
        axis.plot(*zip(*curve, strict=True), color=GREY, lw=1, alpha=0.6, label="entropy")
        swept = sorted((1 + p["cost"], p["accuracy"]) for p in data["sweep"])
        axis.plot(*zip(*swept, strict=True), color=BLUE, lw=1.4, alpha=0.8, label="agent, price swept")
        agent = data["test"]["agent"]
        axis.plot(1 + agent["cost"], agent["accuracy"], "o", color=BLUE, label="agent, chosen")
        random = data["test"]["random"]
        axis.plot(1 + random["cost"], random["accuracy"], "x", color=RED, label="random, equal cost")
        layer = data["test"]["layers"][data["best_layer"]]
        axis.plot(1 + layer["cost"], layer["accuracy"], "s", color=GOLD, label="always the best layer")
    for data in runs.get("longer", {}).values():
        axis.plot(1, data["test"], "D", color=GREEN, label="three-layer CNN, trained as long")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
    axis.set(xlabel="multiply-adds of an image, relative", ylabel="test accuracy, %", title=task.title)
    axis.grid(alpha=0.2)
    return save(figure, path)


def _models(task: Task, runs: Runs, path: Path) -> Path:
    """Figure 6: models 0 to 3."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    for place, arm in enumerate(("model0", "model1", "model2", "dynalay")):
        accuracies = [
            d["test"] if place == 0 else d["test"]["agent"]["accuracy"] for d in runs.get(arm, {}).values()
        ]
        axis.plot([place] * len(accuracies), accuracies, "o", color=BLUE, alpha=0.6)
        if accuracies:
            axis.plot([place - 0.2, place + 0.2], [mean(accuracies)] * 2, color=BLUE)
    axis.set_xticks(range(4), [f"model {i}" for i in range(4)])
    axis.set(ylabel="test accuracy, %", title=f"Figure 6: {task.title}")
    return save(figure, path)
