"""Training an arm, with its multiply-adds counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw

from .cycle import one_cycle
from .tasks import Arm, Opening, Part, Recipe, Task, build
from .unsure import Unsure

__all__ = ["BACKWARD", "fit", "forward_cost", "open_up"]

BACKWARD = 2.0
"""Multiply-adds of a backward pass over those of its forward pass: one product each for weights and input."""

_UNREACHABLE = 1e-12  # a tolerance that no row meets, so that the number of replays is the one drawn


def forward_cost(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image (1, C, H, W) through a plain network: convolutions and matrix products."""
    training = model.training
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(image)
    model.train(training)
    return counter.get_total_flops() // 2


def open_up(model: nn.Module, opening: Opening) -> Unsure | None:
    """Attach the wormhole, with a closed head, for training.

    Returns:
        The policy that says which samples of a batch are iterated; None: all of them are.
    """
    tw.attach(
        model,
        wormholes=opening.span,
        gate=("straight_through", {"hidden": 8}),
        budget=opening.share,
        policy="always",
        scale=opening.scale,
        closed_head=True,
        closed_weight=opening.closed_weight,
        solver="picard",
        adjoint="unrolled",
        tol=_UNREACHABLE,
        max_iter=max(opening.draws),
    )
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if opening.taught >= 1:
        return None
    unsure = Unsure(model, opening.span.partition("->")[0], share=opening.taught)
    tw.configure(model, policy=unsure)
    return unsure


def fit(task: Task, arm: Arm, part: Part, seed: int) -> tuple[nn.Module, int]:
    """Train one network from scratch.

    Args:
        task: says what and how.
        arm: which network.
        part: the training images.
        seed: of weights, order, mirroring and replays.

    Returns:
        The model, and the multiply-adds of all of its forward and backward passes.
    """
    torch.manual_seed(seed)
    return _Fit(task, arm, part, seed).run()


class _Fit:
    def __init__(self, task: Task, arm: Arm, part: Part, seed: int):
        recipe: Recipe = task.recipe
        self.recipe, self.opening, self.part = recipe, arm.opening, part
        self.rate = arm.lr or recipe.lr
        self.model = build(task, arm)
        self.cost = forward_cost(self.model, part.images[:1])
        self.each: int | None = None
        self.unsure: Unsure | None = None
        self.draw = torch.Generator().manual_seed(seed + 1000)
        self.epochs = max(1, round(recipe.epochs * arm.factor))
        self.total = self.epochs * (len(part.labels) // recipe.batch)
        self.spent = 0.0

    def run(self) -> tuple[nn.Module, int]:
        begins = self.total if self.opening is None else round(self.opening.begins * self.total)
        optimizer = self._optimizer(0)
        for update, rows in enumerate(self._batches()):
            if update == begins and self.opening is not None:
                self.unsure = open_up(self.model, self.opening)
                optimizer = self._optimizer(update)
            self.model.train()
            loss = self._loss(*self._images(rows))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            optimizer.step()
            self.schedule.step()
        if self.unsure is not None:
            self.unsure.leave()
            tw.configure(self.model, policy="always")
        return self.model.eval(), round(self.spent)

    def _optimizer(self, done: int) -> torch.optim.Optimizer:
        """AdamW over all parameters that there are now, with its schedule at update ``done``."""
        optimizer, self.schedule = one_cycle(
            self.model, self.rate, self.recipe.weight_decay, self.total, self.recipe.rising, done
        )
        return optimizer

    def _batches(self) -> Iterator[Tensor]:
        count, size = len(self.part.labels), self.recipe.batch
        for _ in range(self.epochs):
            yield from torch.randperm(count, generator=self.draw)[: count - count % size].split(size)

    def _images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = self.part.images[rows]
        if self.recipe.flip:
            mirrored = torch.rand(len(rows), generator=self.draw) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        return images, self.part.labels[rows]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        passes = (1 + BACKWARD) * self.cost * len(labels)
        self.spent += passes
        if not hasattr(self.model, "wormholes"):
            return F.cross_entropy(self.model(images), labels)
        assert self.opening is not None
        draws = self.opening.draws
        count = draws[int(torch.randint(len(draws), (1,), generator=self.draw))]
        tw.configure(self.model, max_iter=count)
        loss = F.cross_entropy(self.model(images), labels)
        beside = tw.closed_loss(self.model, F.cross_entropy, labels)
        assert beside is not None
        (record,) = tw.report(self.model)
        if record.evaluations:
            if self.each is None:
                self.each = record.multiply_adds // record.evaluations
            self.spent += (1 + BACKWARD) * self.each * record.evaluations
        return loss + beside
