"""Cells of ``reasoning``: shipped weights tested, models trained and tested, iterations looked at."""

from __future__ import annotations

import time
from typing import Any

import torch

from zoo.models.reasoning import ReasoningNet
from zoo.tasks import TASKS, Recipe, alignment, curve, score, train_task
from zoo.tasks.examples import Examples
from zoo.tasks.run import load_model

__all__ = ["dynamics", "retrained", "shipped"]

_PIXELS_AT_A_TIME = 2**19
_SCATTER = 250


def shipped(
    model: str, size: int, count: int, seed: int, device: str = "cpu", amp: bool = False
) -> dict[str, Any]:
    """The weights that ship, on held-out examples of one size; ``amp``: under bfloat16 autocast."""
    net, _ = load_model(model)
    examples = _task(model).draw(size, count, seed, "test")
    begin = time.process_time()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        found = score(net.to(device), examples, _batch(examples))
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "cpu_seconds": round(time.process_time() - begin, 2),
        **found.figures(),
        "steps": found.steps[:_SCATTER].tolist(),
        "difficulty": {k: v[:_SCATTER].tolist() for k, v in found.difficulty.items()},
    }


def dynamics(model: str, size: int, count: int, most: int, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Accuracy against iterations, and asymptotic alignment, of the weights that ship."""
    loaded, _ = load_model(model)
    net = loaded.to(device)
    assert isinstance(net, ReasoningNet)
    examples = _task(model).draw(size, count, seed, "test")
    right, change = curve(net, examples, most)
    chosen = score(net, examples).figures()
    thin = sorted({round(most ** (k / 60)) for k in range(61)})
    return {
        "iterations": thin,
        "right": [right[k - 1] for k in thin],
        "change": [change[k - 1] for k in thin],
        "solver": {"right": chosen["right"], "mean_steps": chosen["mean_steps"]},
        "alignment": alignment(net, examples, most),
    }


def retrained(recipe: Recipe, sizes: dict[int, int], device: str = "cpu") -> dict[str, Any]:
    """A model trained by a recipe, then tested at several sizes.

    Args:
        recipe: of the training.
        sizes: examples by size.
        device: where it is trained and tested.
    """
    begin, there = time.process_time(), time.perf_counter()
    trained = train_task(recipe, device=device)
    seconds, wall = time.process_time() - begin, time.perf_counter() - there
    tested = {}
    for size, count in sizes.items():
        examples = recipe.find_task().draw(size, count, 1000, "test")
        tested[str(size)] = score(trained.model, examples, _batch(examples)).figures()
    return {
        "recipe": recipe.as_dict(),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "cpu_seconds": round(seconds, 1),
        "seconds": round(wall, 1),
        "last_loss": float(torch.tensor(trained.losses[-50:]).mean()),
        "tested": tested,
    }


def _task(model: str) -> Any:
    return next(task for task in TASKS.values() if model.endswith(task.models))


def _batch(examples: Examples) -> int:
    return max(1, min(256, _PIXELS_AT_A_TIME // examples.inputs[0].numel()))
