"""The tasks: data without end for training, fixed sets for validation and test, a loss and a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data import load_data
from zoo.data.sequences import adding, as_sequences, copy_memory, stream

__all__ = ["TASKS", "Task", "make_task"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task at one length.

    Attributes:
        name: of the task.
        length: steps of a sequence.
        model: options of :class:`zoo.models.sequence.SequenceModel` that the task sets.
        draw: (count, generator) to a training batch.
        val: fixed sequences and answers, for choices.
        test: fixed ones, for figures.
        loss: (outputs, answers) to a scalar.
        score: (outputs, answers) to (B,) values in [0, 1], the higher the better.
        chance: the loss of the best answer that ignores the sequence.
    """

    name: str
    length: int
    model: dict[str, Any]
    draw: Callable[[int, torch.Generator], Batch]
    val: Batch
    test: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    chance: float


def make_task(name: str, length: int, seed: int, held: int) -> Task:
    """A task of :data:`TASKS`.

    Args:
        name: of the task.
        length: of the adding problem the steps; of copy memory the steps between the symbols and the answer;
            for images the pixels or rows, which must be what the set has.
        seed: of the data.
        held: sequences in the validation and in the test set.
    """
    return TASKS[name](length, seed, held)


def _adding(length: int, seed: int, held: int) -> Task:
    def draw(count: int, generator: torch.Generator) -> Batch:
        x, y = adding(count, length, generator)
        return x, y[:, None]

    return Task(
        "adding",
        length,
        {"inputs": 2, "outputs": 1},
        draw,
        draw(held, stream(f"adding{length}", "val", seed)),
        draw(held, stream(f"adding{length}", "test", seed)),
        F.mse_loss,
        lambda out, y: ((out - y).abs() < 0.04).float().squeeze(1),
        1 / 6,
    )


def _copy(delay: int, seed: int, held: int) -> Task:
    def draw(count: int, generator: torch.Generator) -> Batch:
        return copy_memory(count, delay, generator)

    return Task(
        "copy",
        delay + 20,
        {"inputs": 10, "outputs": 9, "tokens": True, "readout": "all"},
        draw,
        draw(held, stream(f"copy{delay}", "val", seed)),
        draw(held, stream(f"copy{delay}", "test", seed)),
        lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        lambda out, y: (out[:, -10:].argmax(-1) == y[:, -10:]).float().mean(1),
        10 * math.log(8) / (delay + 20),
    )


def _images(name: str, dataset: str, by: str) -> Callable[[int, int, int], Task]:
    def make(length: int, seed: int, held: int) -> Task:
        splits = load_data(dataset)
        spec = splits.spec
        parts = {}
        for part in ("train", "val", "test"):
            split: Any = splits.part(part)
            pixels = (split.images.float() / 255 - spec.mean[0]) / spec.std[0]
            parts[part] = (as_sequences(pixels, by), split.labels)
        inputs = parts["train"][0]
        if inputs.shape[1] != length:
            raise ValueError(f"{name} has {inputs.shape[1]} steps, not {length}.")

        def draw(count: int, generator: torch.Generator) -> Batch:
            rows = torch.randint(0, len(parts["train"][1]), (count,), generator=generator)
            return parts["train"][0][rows], parts["train"][1][rows]

        return Task(
            name,
            length,
            {"inputs": inputs.shape[2], "outputs": spec.num_classes},
            draw,
            tuple(part[:held] for part in parts["val"]),  # type: ignore[arg-type]
            parts["test"],
            F.cross_entropy,
            lambda out, y: (out.argmax(-1) == y).float(),
            math.log(spec.num_classes),
        )

    return make


TASKS: dict[str, Callable[[int, int, int], Task]] = {
    "adding": _adding,
    "copy": _copy,
    "digits": _images("digits", "digits", "pixels"),
    "fashion_rows": _images("fashion_rows", "fashion_mnist", "rows"),
    "fashion_pixels": _images("fashion_pixels", "fashion_mnist", "pixels"),
}
