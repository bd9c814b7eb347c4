"""Training the networks of ``dynalay``, and teaching its agents."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw
from twnn_plugin.policies import Policy
from twnn_plugin.selection import Reward, Study, closed_loss, informed_loss, selection_of

from ..training.cycle import one_cycle
from .tasks import LAYERS, Part, Recipe, Task

__all__ = [
    "backward_times",
    "fit",
    "forward_cost",
    "percent",
    "predict",
    "teach",
    "timed",
    "updates_beside",
]

BACKWARD = 2.0
"""Multiply-adds of a backward pass over those of its forward pass: one product each for weights and input."""

_UNREACHABLE = 1e-12  # a tolerance that no row meets, so that the number of evaluations is the one drawn
_BATCH = 500


def fit(
    model: nn.Module, task: Task, data: dict[str, Part], seed: int, factor: float = 1.0
) -> dict[str, Any]:
    """Train a network from scratch, in place.

    DynaLay's main model is trained without its agent: after the warm-up the samples of a batch of which it is
    least sure iterate a layer drawn at random, and the others none. So each path learns from the samples that
    it will answer for.

    Args:
        model: ``cnn3``, DynaLay or a DEQ.
        task: says how.
        data: the task's parts.
        seed: of order and draws.
        factor: times the recipe's epochs.

    Returns:
        ``curve``: by epoch the training loss, and loss and accuracy on the images that choose (figure 2);
        ``training``: multiply-adds of all passes.
    """
    return _Fit(model, task.recipe, data, seed, factor).run()


class _Fit:
    def __init__(self, model: nn.Module, recipe: Recipe, data: dict[str, Part], seed: int, factor: float):
        self.model, self.recipe, self.data = model, recipe, data
        self.selection = selection_of(model)
        self.epochs = max(1, round(recipe.epochs * factor))
        self.each = len(data["train"].labels) // recipe.batch
        self.draw = torch.Generator().manual_seed(seed + 1000)
        self.warm = round(recipe.warm * self.epochs) if self.selection is not None else 0
        self.spent = 0.0
        self.cost = forward_cost(model, data["train"].images[:1]) if self.selection is None else 0

    def run(self) -> dict[str, Any]:
        recipe, total = self.recipe, self.epochs * self.each
        optimizer, schedule = one_cycle(self.model, recipe.lr, recipe.weight_decay, total)
        curve = []
        for epoch in range(self.epochs):
            self.explore(epoch)
            total = 0.0
            for rows in torch.randperm(len(self.data["train"].labels), generator=self.draw).split(
                self.recipe.batch
            ):
                if len(rows) < self.recipe.batch:
                    continue
                loss = self.loss(self.data["train"].rows(rows))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            curve.append({"train": total / max(self.each, 1), **self._judge()})
        self.model.eval()
        return {"curve": curve, "training": round(self.spent), "epochs": self.epochs}

    def explore(self, epoch: int) -> None:
        """Nobody iterates in the warm-up; after it the least certain do, layers drawn at random."""
        if self.selection is None:
            return
        policy = tw.policy("never")
        if epoch >= self.warm:
            pairs = zip(LAYERS, self.recipe.weights, strict=True)
            weights = [weight for name, weight in pairs if name in self.selection.iterated]
            policy = tw.policy("entropy", share=self.recipe.share, weights=weights)
        self.selection.configure(policy=policy, tol=_UNREACHABLE)

    def loss(self, part: Part) -> Tensor:
        """Of one update."""
        self.model.train()
        if self.selection is None:
            self.spent += (1 + BACKWARD) * self.cost * len(part.labels)
            return F.cross_entropy(self.model(part.images), part.labels)
        draws = self.recipe.draws
        count = draws[int(torch.randint(len(draws), (1,), generator=self.draw))]
        self.selection.configure(max_iter=count)
        logits = self.model(part.images)
        record = self.selection.last
        assert record is not None
        self.spent += (1 + BACKWARD) * (record.open_loop * len(part.labels) + record.multiply_adds)
        return F.cross_entropy(logits, part.labels) + closed_loss(record, part.labels, self.recipe.closed)

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Of the network with nothing iterated."""
        if self.selection is not None:
            self.selection.configure(policy=tw.policy("never"))
        logits = predict(self.model, self.data["choose"])
        labels = self.data["choose"].labels
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": percent((logits.argmax(dim=1) == labels).float()),
        }


def forward_cost(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image (1, C, H, W) through a plain network in eval mode."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


@torch.no_grad()
def predict(model: nn.Module, part: Part) -> Tensor:
    """(N, 10) logits in eval mode."""
    model.eval()
    return torch.cat([model(images) for images in part.images.split(_BATCH)])


def percent(right: Tensor) -> float:
    """Of a (N,) tensor of zeros and ones, or of probabilities."""
    return round(100 * float(right.double().mean()), 3)


def reward_of(beta: float, entropy: float) -> Reward:
    """Quality is the probability of the truth, cost is multiply-adds; against what NOP would have given."""
    return Reward(alpha=1.0, beta=beta, measure="probability", weight=1.0, entropy=entropy)


def teach(policy: Policy, seen: Study, labels: Tensor, recipe: Recipe, beta: float, seed: int) -> list[float]:
    """Teach an agent on a frozen network, with what every choice comes to.

    Args:
        policy: bound to the network, learning.
        seen: what it sees of the images that it is taught on, and the outcomes.
        labels: (n,) of them.
        recipe: says for how long.
        beta: the price of cost.
        seed: of the order.

    Returns:
        The mean expected reward of each epoch, the weight of the entropy left out.
    """
    settings = reward_of(beta, recipe.agent_entropy)
    reward = replace(settings, entropy=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=recipe.agent_decay)
    draw = torch.Generator().manual_seed(seed)
    rewards = []
    for _ in range(recipe.agent_epochs):
        policy.train()
        total = []
        for rows in torch.randperm(len(labels), generator=draw).split(256):
            part = seen.rows(rows)
            with torch.no_grad():
                total.append(-float(informed_loss(policy, part, labels[rows], reward)))
            loss = informed_loss(policy, part, labels[rows], settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(sum(total) / len(total))
    policy.eval()
    return rewards


def backward_times(model: nn.Module, part: Part, rounds: int = 15, batch: int = 64) -> dict[str, float]:
    """Median seconds of forward and backward passes in training mode, at the network's present settings."""
    return timed([(model, _in_turn(_loss_of(model), part, batch))], rounds)[0]


def updates_beside(
    model: nn.Module, selecting: nn.Module, recipe: Recipe, data: dict[str, Part], rounds: int = 30
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of the passes of one update, as :func:`fit` makes them; DynaLay's beside a network's.

    DynaLay's take as long untrained: in training, how often a layer is evaluated is drawn.

    Args:
        model: the other network.
        selecting: DynaLay, fresh.
        recipe: DynaLay's.
        data: the task's parts.
        rounds: updates of each, in turn.
    """
    fitting = _Fit(selecting, recipe, data, seed=0, factor=1.0)
    fitting.explore(fitting.warm)
    losses = (_loss_of(model), fitting.loss)
    theirs, ours = (_in_turn(loss, data["train"], recipe.batch) for loss in losses)
    found = timed([(model, theirs), (selecting, ours)], rounds)
    return found[0], found[1]


def _loss_of(model: nn.Module) -> Callable[[Part], Tensor]:
    return lambda part: F.cross_entropy(model(part.images), part.labels)


def _in_turn(loss: Callable[[Part], Tensor], part: Part, batch: int) -> Callable[[], Tensor]:
    """The loss of one batch after the other."""
    places = itertools.count()

    def of_next() -> Tensor:
        at = next(places)
        return loss(part.rows(torch.arange(at * batch, (at + 1) * batch) % len(part.labels)))

    return of_next


def timed(passes: Sequence[tuple[nn.Module, Callable[[], Tensor]]], rounds: int) -> list[dict[str, float]]:
    """Median seconds of the passes to a loss and back, in training mode, after three to warm up.

    Args:
        passes: networks, each with what makes its loss; taken in turn, round by round.
        rounds: of them.
    """
    forward: list[list[float]] = [[] for _ in passes]
    backward: list[list[float]] = [[] for _ in passes]
    for model, _ in passes:
        model.train()
    for _ in range(rounds + 3):
        for place, (model, loss) in enumerate(passes):
            begin = time.perf_counter()
            value = loss()
            middle = time.perf_counter()
            value.backward()
            end = time.perf_counter()
            model.zero_grad()
            forward[place].append(middle - begin)
            backward[place].append(end - middle)
    for model, _ in passes:
        model.eval()
    pairs = zip(forward, backward, strict=True)
    return [{"forward_s": median(f[3:]), "backward_s": median(b[3:])} for f, b in pairs]
