"""Figure 7 of the paper: fixed-point iteration in the layers of a three-layer LSTM, on text.

The paper takes WikiText-2 and IMDB; here it is the corpus that ships, as a language model and as a
classifier. Every sequence is iterated in the layers that may be, so that nothing but the layers differs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.models  # noqa: F401  (registers the models with timm)
from twnn_plugin.selection import selection_of
from zoo.data.text import TextBatches, TextSplits, load_text

from ..training.cycle import cycle
from .train import percent, timed

__all__ = ["QUICK_TEXTS", "TEXTS", "VARIANTS", "TextTask", "run_text"]

VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "layer1": ("layer1",),
    "layer2": ("layer2",),
    "layer3": ("layer3",),
    "all": ("layer1", "layer2", "layer3"),
}


@dataclass(frozen=True)
class TextTask:
    """A text and how an LSTM is trained on it.

    Attributes:
        name: of the text.
        title: in tables.
        epochs: passes over the training part.
        batch: sequences an update.
        hidden: width of the three layers and of the embedding.
        lr: highest learning rate of AdamW, on one cycle.
        drop_rate: dropout.
        tol: tolerance of the solves.
        max_iter: evaluations at most.
        updates: at most; None: no bound.
    """

    name: str
    title: str
    epochs: int
    batch: int
    hidden: int = 96
    lr: float = 3e-3
    drop_rate: float = 0.2
    tol: float = 1e-2
    max_iter: int = 6
    updates: int | None = None


TEXTS = {
    task.name: task
    for task in (
        TextTask("kjv-small-books", "three books of the Bible told apart", 6, 32),
        TextTask("kjv-small", "language model of three books of the Bible", 10, 16),
    )
}
QUICK_TEXTS = {"kjv-small-books": replace(TEXTS["kjv-small-books"], epochs=1, batch=16, hidden=16, updates=2)}


@lru_cache(maxsize=2)
def _text(name: str) -> TextSplits:
    return load_text(name)


def run_text(task: TextTask, variant: str, seed: int) -> dict[str, Any]:
    """Train one LSTM and test it.

    Returns:
        ``test``: accuracy in percent, or perplexity; ``cost``: multiply-adds of a sequence over those of its
        open-loop pass; ``settled``: share of the sequences whose solves all ended within the tolerance;
        ``curve``: training loss and validation figure by epoch; ``times``: of an update.
    """
    splits = _text(task.name)
    torch.manual_seed(seed)
    model = _model(task, splits, VARIANTS[variant])
    batches = TextBatches(splits.train, task.batch, shuffle=True, drop_last=True, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=1e-2)
    total = min(task.epochs * len(batches), task.updates or math.inf)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, cycle(int(total)))
    curve, done = [], 0
    for epoch in range(task.epochs):
        losses = []
        for tokens, targets in batches.epoch(epoch):
            if done >= total:
                break
            loss = F.cross_entropy(model.train()(tokens), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(float(loss.detach()))
            done += 1
        if losses:
            curve.append({"train": sum(losses) / len(losses), "val": _judge(model, splits, "val")["figure"]})
    found = _judge(model, splits, "test")
    tokens, targets = next(batches.epoch(0))
    spec = splits.spec
    return {
        "recipe": asdict(task),
        "data": f"{task.name}, {len(splits.train)} training sequences of {spec.length} tokens",
        "measure": "perplexity" if spec.task == "language" else "accuracy",
        "test": found["figure"],
        "cost": found["cost"],
        "settled": found["settled"],
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "times": timed([(model, lambda: F.cross_entropy(model(tokens), targets))], rounds=5)[0],
    }


def _model(task: TextTask, splits: TextSplits, layers: tuple[str, ...]) -> nn.Module:
    spec = splits.spec
    solve: dict[str, Any] = {"policy": "always", "max_choices": 1, "solver": "picard", "adjoint": "unrolled"}
    solve |= {"tol": task.tol, "max_iter": task.max_iter, "norm": "max"}
    return timm.create_model(
        "dynalay_lstm3",
        num_classes=spec.num_classes,
        vocab_size=spec.vocab_size,
        task=spec.task,
        hidden=task.hidden,
        drop_rate=task.drop_rate,
        fpi_layers=layers,
        **(solve if layers else {}),
    )


@torch.no_grad()
def _judge(model: nn.Module, splits: TextSplits, part: str) -> dict[str, float]:
    """The figure of a part of the text, what it cost, and whether the solves settled."""
    model.eval()
    selection = selection_of(model)
    loss, right, count, spent, plain, settled, rows = 0.0, [], 0, 0.0, 0.0, 0, 0
    for tokens, targets in TextBatches(splits.part(part), 64):
        logits: Tensor = model(tokens)
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        right.append((logits.argmax(dim=1) == targets).float().flatten())
        count += targets.numel()
        record = None if selection is None else selection.last
        if record is not None:
            spent += record.multiply_adds
            plain += record.open_loop * len(tokens)
            settled += int((~record.fallback.any(dim=1)).sum())
            rows += len(tokens)
    figure = math.exp(loss / count) if splits.spec.task == "language" else percent(torch.cat(right))
    return {
        "figure": figure,
        "cost": 1 + spent / plain if plain else 1.0,
        "settled": settled / rows if rows else 1.0,
    }
