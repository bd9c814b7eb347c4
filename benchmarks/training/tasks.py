"""The tasks of ``wormholes``, the networks that are compared, and the recipes they are trained with.

How the recipes were chosen, on validation data, is told in docs/training.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.models  # noqa: F401  (registers the models with timm)
from zoo.data import ArraySplit, ClutterSplit, hold_out, load_data

__all__ = ["QUICK", "TASKS", "Arm", "Opening", "Part", "Recipe", "Task", "build", "parts"]


@dataclass(frozen=True)
class Recipe:
    """AdamW on one cycle of the learning rate; the same updates for every network but the longer one.

    Attributes:
        epochs: passes over the training images.
        lr: highest learning rate.
        batch: images an update.
        weight_decay: of matrices and kernels; norms and biases are left out.
        rising: share of the updates over which the rate rises; it then falls to zero along a cosine.
        clip: largest norm of the gradient.
        flip: mirror half of the images.
    """

    epochs: int
    lr: float
    batch: int = 64
    weight_decay: float = 0.02
    rising: float = 0.15
    clip: float = 1.0
    flip: bool = False


@dataclass(frozen=True)
class Opening:
    """How a wormhole is trained and used.

    Attributes:
        span: from where to where.
        draws: replays in training; each update draws one of them.
        begins: share of the training after which the wormhole is attached to what was a plain network.
        taught: share of each batch that is iterated in training, those of which the closed head is least
            sure; the others are answered by it. 1: all are iterated.
        scale: initial scale of the message.
        closed_weight: of the closed head's loss on all samples, beside that of the answers.
        share: wanted share of open samples, the headline figure.
        most: multiply-adds in use, at most so many times the plain network's: validation data then choose the
            share, among ``shares``, that does best within it; None: ``share`` is used.
        shares: all of the shares that are looked at.
        tolerances: of the solve in use; the one that does best on validation data is taken.
        max_iter: replays at most.
    """

    span: str
    draws: tuple[int, ...]
    begins: float = 0.0
    taught: float = 1.0
    scale: float = 0.5
    closed_weight: float = 0.5
    share: float = 0.5
    most: float | None = None
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tolerances: tuple[float, ...] = (0.3, 0.1, 0.03)
    max_iter: int = 12


@dataclass(frozen=True)
class Arm:
    """One network.

    Attributes:
        name: in keys.
        title: in tables.
        options: of the model, beside the task's.
        factor: how many times the epochs of the recipe.
        opening: of its wormhole; None: a plain network.
        lr: highest learning rate, if not the recipe's.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    opening: Opening | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Task:
    """A data set, a backbone, a recipe and the networks to compare.

    Attributes:
        name: in keys.
        title: in tables.
        dataset: name of the data set.
        img_size: height and width in pixels; None: the set's own.
        rows: training images, a fixed subset drawn class by class; None: all.
        model: the backbone's name in timm's registry.
        options: of the backbone.
        recipe: of the training.
        arms: the networks, the plain one first.
    """

    name: str
    title: str
    dataset: str
    img_size: int | None
    rows: int | None
    model: str
    options: dict[str, Any]
    recipe: Recipe
    arms: tuple[Arm, ...]

    def arm(self, name: str) -> Arm:
        """The network of this name."""
        return next(arm for arm in self.arms if arm.name == name)


_CUED = Task(
    "cued_digits",
    "digits in clutter, one marked",
    "cued_digits",
    None,
    None,
    "resnet6_tiny",
    {"widths": (8, 16)},
    Recipe(epochs=6, lr=2e-2),
    (
        Arm("plain", "plain backbone"),
        Arm("longer", "plain, trained 3 times as long", factor=3.0),
        Arm("wider", "plain, 1.75 times as wide", {"widths": (14, 28)}),
        Arm("deeper", "plain, 3 times as deep", {"depth": 3}),
        Arm("wormhole", "with a wormhole", opening=Opening("layer2->layer1", (1, 2, 3))),
    ),
)
_FASHION = Task(
    "fashion_mnist",
    "Fashion-MNIST, 14x14",
    "fashion_mnist",
    14,
    20_000,
    "resnet8_tiny",
    {"widths": (8, 16, 32)},
    Recipe(epochs=12, lr=4e-2, flip=True),
    (
        Arm("plain", "plain backbone"),
        Arm("longer", "plain, twice the training", factor=2.0, lr=3e-2),
        Arm(
            "wormhole",
            "with a wormhole over the last stage",
            factor=1.7,
            opening=Opening(
                "layer3->layer3",
                (1,),
                begins=0.1,
                taught=0.55,
                closed_weight=0.0,
                most=1.2,
                shares=(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            ),
        ),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in (_CUED, _FASHION)}


def _quick(task: Task, arms: tuple[str, ...]) -> Task:
    """The same in seconds: few images, one epoch."""
    return replace(
        task, rows=1024, recipe=replace(task.recipe, epochs=1), arms=tuple(task.arm(name) for name in arms)
    )


QUICK: dict[str, Task] = {"cued_digits": _quick(_CUED, ("plain", "wormhole"))}


@dataclass(frozen=True)
class Part:
    """Images ready for a network.

    Attributes:
        images: (N, C, H, W) float32, normalised.
        labels: (N,) int64.
        difficulty: by name, (N,) what makes each image hard, as far as it is known.
    """

    images: Tensor
    labels: Tensor
    difficulty: dict[str, Tensor]

    def every(self, step: int, first: int) -> Part:
        """Of each ``step`` images one, from the ``first`` on."""
        places = slice(first, None, step)
        difficulty = {name: value[places] for name, value in self.difficulty.items()}
        return Part(self.images[places], self.labels[places], difficulty)


@lru_cache(maxsize=1)  # the cells of a task follow each other
def parts(dataset: str, img_size: int | None, rows: int | None, quick: bool) -> dict[str, Part]:
    """Training, validation and test images; with ``quick`` a few hundred of the latter two."""
    data = load_data(dataset, img_size=img_size)
    made = {}
    for name in ("train", "val", "test"):
        split = data.part(name)
        assert isinstance(split, ArraySplit)
        keep = rows if name == "train" else (256 if quick else None)
        if keep is not None and keep < len(split):
            _, chosen = hold_out(split.labels, keep / len(split), seed=0)
            split = split.subset(chosen)
        images = split.images.float() / 255
        if images.shape[-1] != data.spec.img_size:
            size = (data.spec.img_size, data.spec.img_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.spec.mean, data.spec.std))
        images = (images - mean) / std
        images = images.contiguous(memory_format=torch.channels_last)
        known = {}
        if isinstance(split, ClutterSplit):
            known = {"distance": split.distance, "hidden": split.hidden, "items": split.items}
        made[name] = Part(images, split.labels, known)
    return made


def build(task: Task, arm: Arm) -> nn.Module:
    """The arm's backbone, freshly initialised from torch's global generator."""
    options = {**task.options, **arm.options}
    model = timm.create_model(task.model, in_chans=1, num_classes=10, **options)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
