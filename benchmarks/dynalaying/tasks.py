"""The data sets of ``dynalay``, its networks and the recipe that all of them are trained with.

How the recipe was found, on validation data, is told in docs/dynalay.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo.models  # noqa: F401  (registers the models with timm)
from zoo.data import ArraySplit, hold_out, load_data

__all__ = [
    "DEQ_WAYS",
    "LAYERS",
    "QUICK",
    "TASKS",
    "Part",
    "Recipe",
    "Task",
    "deq",
    "dynalay",
    "parts",
    "plain",
]

LAYERS = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Recipe:
    """AdamW on one cycle of the learning rate.

    Attributes:
        epochs: passes over the training images.
        warm: share of them in which the main model alone is trained, with nothing iterated (figure 4).
        longer: how many times the epochs of the plain network that is trained as long as DynaLay, in
            multiply-adds or more.
        batch: images an update.
        lr: highest learning rate.
        weight_decay: of matrices and kernels.
        clip: largest norm of the gradient.
        draws: evaluations in a training solve; each update draws one of them.
        share: of the samples of a batch that iterate while the main model is trained: those of the highest
            entropy, each one layer at random.
        weights: how often each of the three layers is drawn.
        closed: weight of the closed path's loss, beside that of the answers.
        hidden: channels within the connections' mixers.
        scale: initial scale of the connections.
        tolerances: of the solves in use; one is chosen on validation data.
        max_iter: evaluations at most, in use.
        agent_epochs: passes over the images that the agent is taught on.
        betas: prices of a unit of cost that agents are taught with.
        budget: multiply-adds that the frugal agent may spend on average, relative to the open-loop pass.
        part: those that the other agent may spend, relative to iterating the best layer always.
        agent_decay: weight decay of the agent.
        agent_entropy: weight of its entropy; near zero its scores run away from what they stand for.
        deq_epochs: passes in which the DEQ is trained.
        deq_lr: highest learning rate of the DEQ, the best of three in the benchmark ``models``.
    """

    epochs: int = 20
    warm: float = 0.25
    longer: float = 2.4
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 1e-2
    clip: float = 2.0
    draws: tuple[int, ...] = (1, 2, 3)
    share: float = 0.5
    weights: tuple[float, ...] = (1.0, 8.0, 1.0)
    closed: float = 0.0
    hidden: int = 16
    scale: float = 1.0
    tolerances: tuple[float, ...] = (0.3, 0.1, 0.03)
    max_iter: int = 12
    agent_epochs: int = 20
    betas: tuple[float, ...] = (0.0, 0.0003, 0.0006, 0.0012, 0.002, 0.003, 0.006, 0.015)
    budget: float = 1.3
    part: float = 0.6
    agent_decay: float = 0.1
    agent_entropy: float = 0.1
    deq_epochs: int = 5
    deq_lr: float = 2e-2


@dataclass(frozen=True)
class Task:
    """A data set and the sizes of what is trained on it.

    Attributes:
        name: of the data set.
        title: in tables.
        channels: of its images.
        img_size: height and width in pixels.
        rows: training images, a fixed subset drawn class by class; None: all.
        held: validation and test images at most, each; None: all.
        widths: of the three layers.
        recipe: of the training.
    """

    name: str
    title: str
    channels: int
    img_size: int
    rows: int | None
    held: int | None
    widths: tuple[int, int, int]
    recipe: Recipe


_FASHION = Task("fashion_mnist", "Fashion-MNIST, 14x14", 1, 14, 20_000, None, (8, 16, 32), Recipe())
_CIFAR = Task("cifar10", "CIFAR-10, 16x16", 3, 16, 20_000, None, (8, 16, 32), Recipe())
TASKS: dict[str, Task] = {task.name: task for task in (_FASHION, _CIFAR)}
QUICK: dict[str, Task] = {
    "fashion_mnist": replace(
        _FASHION,
        rows=256,
        held=96,
        recipe=replace(
            Recipe(), epochs=2, warm=0.5, longer=1.5, agent_epochs=2, betas=(0.0, 0.1, 0.4), deq_epochs=1
        ),
    )
}


@dataclass(frozen=True)
class Part:
    """Images ready for a network.

    Attributes:
        images: (N, C, H, W) float32, normalised.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> Part:
        """Some of them."""
        return Part(self.images[index], self.labels[index])


@lru_cache(maxsize=1)  # the cells of a task follow each other
def parts(task: Task) -> dict[str, Part]:
    """Training images; validation images in two halves, to teach the agent and to choose; test images."""
    data = load_data(task.name, img_size=task.img_size)
    made = {}
    for name, keep in (("train", task.rows), ("val", task.held), ("test", task.held)):
        subset = data.part(name)
        assert isinstance(subset, ArraySplit)
        if keep is not None and keep < len(subset):
            _, chosen = hold_out(subset.labels, keep / len(subset), seed=0)
            subset = subset.subset(chosen)
        images = subset.images.float() / 255
        if images.shape[-1] != task.img_size:
            size = (task.img_size, task.img_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.spec.mean, data.spec.std))
        made[name] = Part((images - mean) / std, subset.labels)
    val = made.pop("val")
    order = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(0))
    half = len(order) // 2
    return {**made, "teach": val.rows(order[:half]), "choose": val.rows(order[half:])}


def _build(task: Task, name: str, **options: Any) -> nn.Module:
    """A network of the zoo for the task's images, freshly initialised from torch's global generator."""
    return timm.create_model(name, in_chans=task.channels, num_classes=10, **options)


def plain(task: Task) -> nn.Module:
    """Three layers and a classifier; "Model 0" of the paper, without the last pooling."""
    return _build(task, "dynalay_cnn3", widths=task.widths, last_pool=False, fpi_layers=())


def dynalay(task: Task, layers: tuple[str, ...] = LAYERS) -> nn.Module:
    """The same with fixed-point iteration on some layers: models 1 to 3."""
    return _build(
        task,
        "dynalay_cnn3",
        widths=task.widths,
        last_pool=False,
        fpi_layers=layers,
        policy="never",
        max_choices=1,
        open_head=True,
        message="mixer",
        hidden=task.recipe.hidden,
        scale=task.recipe.scale,
        solver="picard",
        adjoint="unrolled",
    )


DEQ_WAYS: dict[str, dict[str, Any]] = {
    "implicit": {},
    "phantom": {"ift": False, "grad": 5},  # torchdeq's way through the last steps
    # And through all of them: torchdeq's phantom gradient after one free evaluation.
    "unrolled": {"f_solver": "simple_fixed_point_iter", "f_max_iter": 1, "ift": False, "grad": 23},
}


def deq(task: Task, way: str, in_use: bool = False) -> nn.Module:
    """torchdeq's equilibrium, as the zoo builds it, with the size and the solver of ``models``.

    Args:
        task: whose images.
        way: of the gradient, of ``DEQ_WAYS``.
        in_use: solved as it is when there is no gradient, whatever the way.
    """
    options = DEQ_WAYS["implicit" if in_use else way]
    return _build(task, "deq_tiny", width=24, inner=32, downsample=1, **options)
