"""Training to a budget of multiply-adds, with the learning rate chosen on validation data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.sequence import RecurrentLayer
from zoo.data.sequences import stream
from zoo.models.sequence import SequenceModel

from .models import build, parameters, sized
from .tasks import Task

__all__ = ["RATES", "Recipe", "contest", "evaluate"]

RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates that each contestant tries."""


@dataclass(frozen=True)
class Recipe:
    """How all contestants of a task are trained.

    Attributes:
        hidden: width of the plain GRU.
        updates: updates of the plain GRU; the others stop when they have spent its multiply-adds.
        batch: sequences an update.
        held: sequences in the validation and in the test set.
        looks: how often the validation loss is written down.
        tries: share of the budget after which the learning rate is chosen; the winner goes on from there.
    """

    hidden: int = 32
    updates: int = 1000
    batch: int = 64
    held: int = 512
    looks: int = 20
    tries: float = 0.2


@dataclass
class _Run:
    """One contestant in training."""

    model: SequenceModel
    task: Task
    recipe: Recipe
    rate: float
    budget: float
    seed: int
    device: str
    spent: float = 0.0
    updates: int = 0
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    failed: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), self.rate)
        self.data = stream(f"{self.task.name}{self.task.length}", "train", self.seed)
        self.finite = True

    def until(self, share: float) -> None:
        """Train until ``share`` of the budget is spent; write validation figures down on the way."""
        gap = self.budget / self.recipe.looks
        due = (len(self.curve) + 1) * gap
        while self.spent < share * self.budget and self.finite:
            self._update()
            if self.spent >= due:
                loss, score = evaluate(self.model, *self.task.val, self.task)
                self.curve.append((self.spent / self.budget, loss, score))
                due += gap

    def _update(self) -> None:
        done = self.spent / self.budget
        for group in self.optimizer.param_groups:
            # Constant, then to zero over the last half of the budget.
            group["lr"] = self.rate * min(1.0, 2 * (1 - done))
        x, y = (part.to(self.device) for part in self.task.draw(self.recipe.batch, self.data))
        self.model.train()
        loss = self.task.loss(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            self.failed += 1
            self.finite = self.failed < 20
        self.spent += cost(self.model, self.task, self.recipe.batch)
        self.updates += 1
        for record in self.model.stack.records():
            self.steps.append(float(record.steps.float().mean()))


def layer_cost(model: SequenceModel, length: int) -> int:
    """Multiply-adds of one plain pass of the recurrent layers over one sequence."""
    layers = [m for m in model.stack.modules() if isinstance(m, RecurrentLayer)]
    return sum(layer.multiply_adds(length) for layer in layers)


def cost(model: SequenceModel, task: Task, batch: int) -> float:
    """Multiply-adds of the last update, of recurrent layers and messages; a backward pass counts twice.

    A solve adds its evaluations and, for the gradient, its vector-Jacobian products, each counted as a
    backward pass.
    """
    once = layer_cost(model, task.length)
    records = model.stack.records()
    if not records:
        return 3.0 * batch * once
    record = records[0]
    evaluations = record.multiply_adds
    each = evaluations / max(record.evaluations, 1)
    products = record.adjoint.evaluations if record.adjoint is not None else 0
    if model.stack.window is not None:  # one pass and its backward pass, window by window
        return 3.0 * evaluations
    # The open-loop pass has no backward pass; the last evaluation has.
    return batch * once + evaluations + 2.0 * each * products + 2.0 * each * batch


@torch.no_grad()
def evaluate(model: SequenceModel, x: Tensor, y: Tensor, task: Task, batch: int = 512) -> tuple[float, float]:
    """Loss and mean score on a set, in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    losses, scores = [], []
    for begin in range(0, len(x), batch):
        part = slice(begin, begin + batch)
        out = model(x[part].to(device))
        answers = y[part].to(device)
        losses.append(float(task.loss(out, answers)) * len(out))
        scores.append(task.score(out, answers))
    return sum(losses) / len(x), float(torch.cat(scores).mean())


def contest(
    name: str,
    task: Task,
    recipe: Recipe,
    seed: int,
    rates: tuple[float, ...] = RATES,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one contestant: each rate for a while, the best of them to the end.

    Returns:
        JSON values: the test figures, the curve of validation figures, the work and the failures.
    """
    plain = build("GRU", task, recipe.hidden)
    budget = 3.0 * recipe.batch * layer_cost(plain, task.length) * recipe.updates
    runs = []
    for rate in rates:
        torch.manual_seed(seed)
        model = sized(name, task, recipe.hidden).to(device)
        run = _Run(model, task, recipe, rate, budget, seed, device)
        run.until(recipe.tries if len(rates) > 1 else 1.0)
        runs.append(run)
    best = min(runs, key=lambda run: run.curve[-1][1] if run.finite and run.curve else math.inf)
    tried = {f"{run.rate:g}": run.curve[-1][1] if run.curve else None for run in runs}
    best.until(1.0)
    loss, score = evaluate(best.model, *task.test, task)
    records = tw.report(best.model) if best.model.stack.spans else []
    test_failed = sum(int((record.status != 0).sum()) for record in records)
    return {
        "rate": best.rate,
        "tried": tried,
        "test_loss": loss,
        "test_score": score,
        "val_loss": best.curve[-1][1] if best.curve else None,
        "curve": [[round(v, 5) for v in point] for point in best.curve],
        "updates": best.updates,
        "parameters": parameters(best.model),
        "hidden": best.model.stack.hidden_size,
        "steps": round(sum(best.steps) / len(best.steps), 2) if best.steps else 0.0,
        "not_finite": best.failed,
        "test_not_converged": test_failed,
        "chance": task.chance,
    }
