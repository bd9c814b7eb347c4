"""Training of the reasoning models on examples that are drawn as they are needed."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from ..build import create
from ..checkpoint import restore_rng, rng_state
from ..errors import CheckpointError, ConfigError, TrainingError, ZooError
from ..interrupt import Interruption
from ..progress import Bar
from .catalog import Task
from .examples import Examples
from .objectives import Batches, Phantom, objective_of
from .recipe import Recipe
from .scoring import score

__all__ = ["Trained", "train_task"]

_BETAS = (0.9, 0.99)
_VALIDATION = 256


@dataclass(frozen=True)
class Trained:
    """What a training ended with.

    Attributes:
        model: with the moving average of the weights, in eval mode; the best on validation data, or the
            last, as the recipe says.
        losses: of every update.
        seconds: spent.
    """

    model: nn.Module
    losses: list[float]
    seconds: float


def train_task(
    recipe: Recipe,
    *,
    data: Examples | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
    console: Any = None,
    state: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    save_every: int = 200,
    device: torch.device | str = "cpu",
) -> Trained:
    """Train ``recipe.model``; the same recipe gives the same weights on the same machine.

    The global random state is seeded from ``recipe.seed``.

    Args:
        recipe: the settings.
        data: examples at hand, which are passed over again and again; None: new ones are drawn.
        callback: called with the number of updates done and the averaged model after each update.
        console: a ``rich`` console for a progress bar.
        state: of an interrupted training with the same recipe and data, as ``save`` was given it: it goes on
            to the same weights, to the bit.
        save: called with the state, plain values and tensors, every ``save_every`` updates and on Ctrl-C.
        save_every: updates.
        device: where it is trained; examples are drawn on the CPU.

    Raises:
        ConfigError: the method does not suit the model, or this cannot be built with its options.
        TrainingError: the loss is not finite any more.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    run = _Training(recipe, data, torch.device(device))
    if state is not None:
        run.load(state)
    with Bar(console, f"training {recipe.model}", recipe.updates) as bar, ExitStack() as stack:
        interruption = stack.enter_context(Interruption()) if save is not None else None
        bar.advance(run.done)
        while run.done < recipe.updates:
            run.update()
            if callback is not None:
                callback(run.done, run.averaged)
            bar.advance()
            stopped = interruption is not None and interruption.wanted
            if save is not None and (stopped or run.done % save_every == 0):
                save(run.state())
            if stopped:
                raise KeyboardInterrupt
    return run.result()


class _Training:
    """A training between two updates."""

    def __init__(self, recipe: Recipe, data: Examples | None, device: torch.device):
        torch.manual_seed(recipe.seed)
        self.recipe, self.done, self.seconds, self.device = recipe, 0, 0.0, device
        task = recipe.find_task()
        self.model = create(recipe.model, options=recipe.model_kwargs).to(device).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=_BETAS, weight_decay=0.0
        )
        self.batches = Batches(recipe, task, data, device)
        self.random = np.random.default_rng([recipe.seed, 4])
        self.objective = objective_of(recipe, self.model, self.batches, self.random)
        self.losses: list[float] = []
        self.best = _Best(recipe, task) if recipe.select else None

    def update(self) -> None:
        """One update of the weights and of their average."""
        recipe, begin = self.recipe, time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(self.done, recipe)
        loss = self.objective(self.done)
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise TrainingError(f"The loss is {self.losses[-1]} after {self.done} updates; try a smaller lr.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        _average(self.averaged, self.model, min(recipe.ema, (1 + self.done) / (10 + self.done)))
        self.done += 1
        if self.best is not None and (self.done % recipe.select == 0 or self.done == recipe.updates):
            self.best.look(self.averaged)
        self.seconds += time.perf_counter() - begin

    def result(self) -> Trained:
        if self.best is not None:
            self.averaged.load_state_dict(self.best.weights)
        return Trained(self.averaged.eval(), self.losses, self.seconds)

    def state(self) -> dict[str, Any]:
        """Everything that the next updates depend on beside the recipe."""
        kept = self.objective.kept if isinstance(self.objective, Phantom) else []
        best = self.best
        return {
            "recipe": self.recipe.as_dict(),
            "updates": self.done,
            "seconds": self.seconds,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": list(self.losses),
            "rng": rng_state(self.device),
            "random": json.dumps(self.random.bit_generator.state),
            "batches": self.batches.state(),
            "kept": [list(item) for item in kept],
            "best": None if best is None else {"right": best.right, "weights": dict(best.weights)},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ConfigError: it is of a training with other settings.
            CheckpointError: it is damaged, or was written by another version.
        """
        try:
            self._load(state)
        except ZooError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"The state to go on from is not that of this run: {error!r}.") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        theirs = Recipe.from_dict(state["recipe"])
        if theirs != self.recipe:
            other = [
                f.name for f in fields(Recipe) if getattr(theirs, f.name) != getattr(self.recipe, f.name)
            ]
            raise ConfigError(
                f"The interrupted training had other settings ({', '.join(other)}): resume it with its own."
            )
        self.done, self.seconds, self.losses = state["updates"], state["seconds"], list(state["losses"])
        self.model.load_state_dict(state["state_dict"])
        self.averaged.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.go_on(self.done, state["batches"])  # each update takes one
        if isinstance(self.objective, Phantom):
            moved = [[tensor.to(self.device) for tensor in item] for item in state["kept"]]
            self.objective.kept = [(item[0], item[1], item[2]) for item in moved]
        if self.best is not None:
            self.best.right, self.best.weights = state["best"]["right"], dict(state["best"]["weights"])
        self.random.bit_generator.state = json.loads(state["random"])
        restore_rng(state["rng"], self.device)


class _Best:
    """The weights that were right most often on validation examples of the size that is trained on."""

    def __init__(self, recipe: Recipe, task: Task):
        self.examples = task.draw(recipe.size, _VALIDATION, recipe.seed, "val")
        self.right, self.weights = -1.0, {}

    def look(self, model: nn.Module) -> None:
        right = float(score(model, self.examples).right.double().mean())
        if right >= self.right:
            self.right, self.weights = right, copy.deepcopy(model.state_dict())


def _schedule(update: int, recipe: Recipe) -> float:
    rise = (update + 1) / max(recipe.warmup, 1)
    fall = 2 * (recipe.updates - update) / recipe.updates
    return min(1.0, rise, fall)


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
