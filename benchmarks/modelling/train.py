"""Training one network: rates tried alike, time split into forward and backward, multiply-adds executed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..harness import Executed, Stopwatch
from ..training.cycle import one_cycle
from ..training.tasks import Part
from .arms import Arm, Scale
from .networks import Shape

__all__ = ["Run", "accuracy_of", "fit"]

TRIES, RISING, DECAY, CLIP = 0.15, 0.15, 0.02, 1.0
"""Share of the training that every rate gets, share over which the rate rises, weight decay, largest norm."""
PHASES = ("forward", "backward", "step")


@torch.no_grad()
def accuracy_of(model: nn.Module, part: Part, batch: int = 500) -> float:
    """Share of a part's images that are classified correctly, in eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for images, labels in zip(part.images.split(batch), part.labels.split(batch), strict=True):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    model.train(was_training)
    return right / len(part.labels)


@dataclass
class Run:
    """One network in training at one rate.

    Attributes:
        curve: [updates, seconds of forward, backward and step, multiply-adds, validation accuracy] of every
            look; all but the accuracy are sums from the start on.
        worst: the first value of the loss that was not finite; None.
    """

    arm: Arm
    shape: Shape
    scale: Scale
    parts: dict[str, Part]
    rate: float
    seed: int
    device: str
    amp: bool
    updates: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    multiply_adds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    worst: float | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.arm.network.build(self.shape).to(self.device)
        per_epoch = len(self.parts["train"].labels) // self.scale.batch
        whole = self.scale.updates or self.scale.epochs * per_epoch
        self.total = max(2, round(whole * self.arm.share_of(self.scale.name)))
        self.draw = torch.Generator().manual_seed(self.seed + 1000)
        self.optimizer, self.schedule = one_cycle(
            self.model, self.rate, DECAY, self.total, RISING, self.updates
        )
        self.batches = self._batches()

    def until(self, share: float) -> None:
        """Train until this share of the updates is done; look at the validation part on the way."""
        gap = max(1, self.total // self.scale.looks)
        goal = max(1, round(share * self.total))
        while self.updates < goal and self.worst is None:
            count = min(gap - self.updates % gap, goal - self.updates)
            self._some(count)
            used = self.arm.network.in_use(self.model, self.shape)
            accuracy = accuracy_of(used, self.parts["val"])
            sums = [self.seconds[phase] for phase in PHASES]
            self.curve.append([self.updates, *sums, self.multiply_adds, accuracy])

    def _some(self, count: int) -> None:
        """So many updates; the last's multiply-adds stand for all, the others' time for its own."""
        watch = Stopwatch(self.device)
        before = dict(self.seconds)
        for _ in range(count - 1):
            laps = self._update(watch)
            for phase in PHASES:
                self.seconds[phase] += laps[phase]
        with Executed() as executed:
            laps = self._update(watch)
        self.multiply_adds += count * executed.multiply_adds
        for phase in PHASES:  # counting takes time; a single update has no other to stand for it
            mean = (self.seconds[phase] - before[phase]) / (count - 1) if count > 1 else laps[phase]
            self.seconds[phase] += mean

    def _update(self, watch: Stopwatch) -> dict[str, float]:
        network = self.arm.network
        images, labels = next(self.batches)
        if network.begin(self.model, self.updates, self.total):
            self.optimizer, self.schedule = one_cycle(
                self.model, self.rate, DECAY, self.total, RISING, self.updates
            )
        self.model.train()
        watch.start()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = network.loss(self.model, images, labels, self.draw)
        watch.lap("forward")
        self.optimizer.zero_grad()
        loss.backward()
        watch.lap("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        value = float(norm)
        if math.isfinite(value):
            self.optimizer.step()
        else:
            self.worst = value
        watch.lap("step")
        network.stepped(self.model)
        self.schedule.step()
        self.updates += 1
        return watch.laps()

    def _optimizer(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        return one_cycle(self.model, self.rate, DECAY, self.total, RISING, self.updates)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Half of the images mirrored; an epoch after the other, without end."""
        part, size = self.parts["train"], self.scale.batch
        count = len(part.labels)
        while True:
            for rows in torch.randperm(count, generator=self.draw)[: count - count % size].split(size):
                mirrored = torch.rand(size, generator=self.draw) < 0.5
                images = part.images[rows]
                images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
                yield images.to(self.device), part.labels[rows].to(self.device)


def fit(
    arm: Arm, shape: Shape, scale: Scale, parts: dict[str, Part], seed: int, device: str, amp: bool = False
) -> tuple[Run, dict[str, Any]]:
    """Train: every rate for a while, the best of them on validation data to the end.

    Returns:
        The run, whose model is trained, and what was tried and spent, as JSON values.
    """
    runs = []
    for rate in arm.rates:
        run = Run(arm, shape, scale, parts, rate, seed, device, amp)
        run.until(TRIES)
        runs.append(run)
    best = max(runs, key=lambda run: -1.0 if run.worst is not None else run.curve[-1][-1])
    tried = {f"{run.rate:g}": run.curve[-1][-1] for run in runs}
    best.until(1.0)
    if best.worst is not None:
        raise RuntimeError(f"The gradient of {arm.name} became {best.worst} at update {best.updates}.")
    return best, {
        "rate": best.rate,
        "tried": tried,
        "search_seconds": sum(sum(run.seconds.values()) for run in runs if run is not best),
        "updates": best.updates,
        "seconds": best.seconds,
        "multiply_adds": best.multiply_adds,
        "curve": best.curve,
    }
