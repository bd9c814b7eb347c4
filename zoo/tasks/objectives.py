"""What an update of a reasoning model is computed from: its batch, its loss by the recipe's method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twnn_plugin import jacobian_frobenius

from ..errors import ConfigError
from ..models.reasoning import Iterated
from .catalog import Growing, Task, passes, stream
from .examples import Examples
from .recipe import Recipe

__all__ = ["QUESTIONS", "Batches", "Phantom", "objective_of", "traced_loss"]

QUESTIONS = 2  # that traced images have answers to
_ENDS = 4  # what the ends of a contour add to its length, in dashes


class Batches:
    """The batches of a training without end, on the device that it is on.

    Args:
        recipe: of the training.
        task: draws examples, on the CPU.
        data: examples at hand, in place of those that are drawn.
        device: where they go.

    Raises:
        ConfigError: the recipe asks for several sizes, and the examples at hand are of one; or for marks or
            images without dots, and they have none.
    """

    def __init__(self, recipe: Recipe, task: Task, data: Examples | None, device: torch.device):
        self.source, self.device = _source(recipe, task, data), device

    def __next__(self) -> Examples:
        return next(self.source).to(self.device)

    @property
    def size(self) -> int | None:
        """The size of the last batch, where they grow; None where they do not."""
        return self.source.size if isinstance(self.source, Growing) else None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy; what was right decides when examples grow."""
        if isinstance(self.source, Growing) and self.source.passed:
            self.source.tell(logits.detach().argmax(dim=1) == targets)
        return F.cross_entropy(logits, targets)

    def state(self) -> dict[str, Any]:
        """What else than the recipe and their number decides which batches come."""
        if not isinstance(self.source, Growing):
            return {}
        return {"right": self.source.right, "passes": list(self.source.passes)}

    def go_on(self, count: int, state: Mapping[str, Any]) -> None:
        """Go past some batches, to where a training was whose :meth:`state` this was."""
        if isinstance(self.source, Growing):
            self.source.right, self.source.passes = state["right"], list(state["passes"])
        for _ in range(count):
            next(self.source)


def _source(recipe: Recipe, task: Task, data: Examples | None) -> Iterator[Examples]:
    if data is not None and recipe.easier:
        raise ConfigError("Examples at hand are of one size: leave easier out, or draw them (no data).")
    if data is not None and recipe.traced and data.marks is None:
        raise ConfigError("The examples at hand have no marks: leave traced out, or draw them (no data).")
    if data is not None and recipe.late and data.early is None:
        raise ConfigError(
            "The examples at hand have no images without dots: leave late out, or draw them (no data)."
        )
    if data is not None:
        return passes(data, recipe.batch_size, recipe.seed)
    if recipe.easier:
        sizes = (*recipe.easier, recipe.size)
        return Growing(
            task, sizes, recipe.updates, recipe.batch_size, recipe.seed, recipe.passed, recipe.grown
        )
    return stream(task, recipe.size, recipe.batch_size, recipe.seed)


def traced_loss(answers: Tensor, marks: Tensor) -> Tensor:
    """How well two questions are answered where a dash is.

    Is there a contour here with a dot? Does such a contour end here without a dot? Of the ground between the
    dashes nothing is asked: a state that is to be read there, too, learns to trace more slowly.

    Args:
        answers: logits (B, 2, h, w).
        marks: (B, 1, H, W), those of Pathfinder.

    Returns:
        Mean cross-entropies of both, added up.
    """
    size = (answers.shape[2], answers.shape[3])
    none, some, end = (F.adaptive_max_pool2d((marks == mark).float(), size) for mark in range(3))
    dotted = _answered(answers[:, :1], torch.maximum(some, end), none)
    return dotted + _answered(answers[:, 1:], end, torch.maximum(none, some) * (1 - end))


def _answered(answer: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Mean cross-entropy over the positions that are one of both."""
    known = yes != no
    losses = F.binary_cross_entropy_with_logits(answer, yes, reduction="none")
    return (losses * known).sum() / known.sum().clamp_min(1)


def objective_of(
    recipe: Recipe,
    model: nn.Module,
    batches: Batches,
    random: np.random.Generator,
) -> Callable[[int], Tensor]:
    """The loss of an update, by the recipe's method.

    Args:
        recipe: the settings.
        model: what is trained.
        batches: what it is trained on.
        random: of the numbers of steps.

    Raises:
        ConfigError: ``traced``, and the model does not answer that many questions.
        OptionError: the method iterates a step, and the model has none.
    """
    from twnn_plugin.errors import OptionError

    if recipe.traced:
        found = getattr(model, "questions", 0)
        if found != QUESTIONS:
            raise ConfigError(
                f"traced={recipe.traced} teaches a model to answer {QUESTIONS} questions at each position; "
                f"{recipe.model} answers {found}. Set questions={QUESTIONS} in model_kwargs, or leave it out."
            )
    if recipe.method == "plain" and recipe.traced:
        return lambda update: _plainly_traced(recipe, model, batches)
    if recipe.method in ("plain", "implicit"):
        return lambda update: _whole(model, batches)
    if not isinstance(model, Iterated):
        raise OptionError(
            f"Method {recipe.method!r} iterates the model's step; {recipe.model} has none. Use 'plain' "
            "or 'implicit'."
        )
    if recipe.method == "progressive":
        return lambda update: _progressive(recipe, model, next(batches), random)
    if recipe.method == "unrolled":
        return lambda update: _unrolled(recipe, model, batches, random)
    return Phantom(recipe, model, batches, random)


def _whole(model: nn.Module, batches: Batches) -> Tensor:
    batch = next(batches)
    return batches.loss(model(batch.inputs), batch.targets)


def _plainly_traced(recipe: Recipe, model: Any, batches: Batches) -> Tensor:
    batch = next(batches)
    return _traced(recipe, model, batches, batch, model.forward_features(batch.inputs))


def _draw(random: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(random.integers(bounds[0], bounds[1] + 1))


def _run(model: Iterated, z: Tensor, x: Tensor, steps: int, recipe: Recipe) -> Tensor:
    for _ in range(steps):
        if recipe.carried < 1 and torch.is_grad_enabled():
            new = model.step(torch.lerp(z.detach(), z, recipe.carried), x)
            new = torch.where(new == z, z, new)
        else:
            new = model.step(z, x)
        if recipe.drop:
            new = torch.where(torch.rand_like(new[:, :1]) < recipe.drop, z, new)
        z = new
    return z


def _unrolled(recipe: Recipe, model: Iterated, batches: Batches, random: np.random.Generator) -> Tensor:
    batch, bounds = next(batches), recipe.graded
    if batches.size is not None:  # a contour's ends count, too, so that the shortest still take a few
        share = (batches.size + _ENDS) / (recipe.size + _ENDS)
        bounds = (max(1, round(share * bounds[0])), max(1, round(share * bounds[1])))
    x = model.inject(batch.inputs)
    z = model.blank(x)
    if (recipe.late or recipe.beyond) and random.random() < 0.5:
        with torch.no_grad():
            if recipe.late:
                assert batch.early is not None
                z = _run(model, z, model.inject(batch.early), _draw(random, (0, recipe.late)), recipe)
            if recipe.beyond and batches.size in (None, recipe.size):
                z = _run(model, z, x, _draw(random, (0, recipe.beyond)), recipe)
    z = _run(model, z, x, _draw(random, bounds), recipe)
    if recipe.traced:
        return _traced(recipe, model, batches, batch, z)
    return batches.loss(model.read(z, x), batch.targets)


def _traced(recipe: Recipe, model: Any, batches: Batches, batch: Examples, features: Tensor) -> Tensor:
    """The loss of both: what is answered at each position, and the classifier that reads the answers."""
    assert batch.marks is not None
    answers = model.answers(features)
    # A classifier that teaches the features, too, may have them show what tells short contours apart, such
    # as how far a trace has come, and that tells nothing of long ones.
    read = answers.detach() if recipe.apart else answers
    loss = batches.loss(model.classify(read), batch.targets)
    return loss + recipe.traced * traced_loss(answers, batch.marks)


def _progressive(recipe: Recipe, model: Iterated, batch: Examples, random: np.random.Generator) -> Tensor:
    """Bansal et al. (2022), algorithm 1."""
    x = model.inject(batch.inputs)
    most = recipe.graded[1]
    loss = torch.zeros((), device=x.device)
    if recipe.alpha < 1:
        z = _run(model, model.blank(x), x, most, recipe)
        loss = (1 - recipe.alpha) * F.cross_entropy(model.read(z, x), batch.targets)
    if recipe.alpha > 0:
        free = _draw(random, (0, most - 1))
        with torch.no_grad():
            z = _run(model, model.blank(x), x, free, recipe)
        z = _run(model, z, x, _draw(random, (1, most - free)), recipe)
        loss = loss + recipe.alpha * F.cross_entropy(model.read(z, x), batch.targets)
    return loss


class Phantom:
    """The method "phantom": free steps from noise, zero or kept states, then a few steps with gradient."""

    def __init__(self, recipe: Recipe, model: Iterated, batches: Batches, random: np.random.Generator):
        self.recipe, self.model, self.batches, self.random = recipe, model, batches, random
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, update: int) -> Tensor:
        recipe, model = self.recipe, self.model
        inputs, targets, z = self._start()
        x = model.inject(inputs)
        if z is None:
            z = self._fresh(x)
        with torch.no_grad():
            z = _run(model, z, x, _draw(self.random, recipe.free), recipe)
        penalty = torch.zeros((), device=x.device)
        if recipe.jacobian and update >= recipe.jacobian_from * recipe.updates:
            penalty = recipe.jacobian * jacobian_frobenius(model.step, z, x.detach())
        z = _run(model, z, x, _draw(self.random, recipe.graded), recipe)
        if recipe.buffer:
            self.kept.append((inputs, targets, z.detach()))
        return F.cross_entropy(model.read(z, x), targets) + penalty

    def _fresh(self, x: Tensor) -> Tensor:
        """Zero, or noise of random scale in some rows."""
        z = self.model.blank(x)
        chosen = torch.rand(len(z), device=z.device) < self.recipe.noise
        rows = chosen.float() * torch.rand(len(z), device=z.device)
        return z + torch.randn_like(z) * rows.view(-1, 1, 1, 1)

    def _start(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A new batch, or the one that has been kept the longest with some rows begun anew."""
        recipe, new = self.recipe, next(self.batches)
        if len(self.kept) * recipe.batch_size < recipe.buffer or not recipe.buffer:
            return new.inputs, new.targets, None
        inputs, targets, z = self.kept.pop(0)
        again = torch.rand(len(z), device=z.device) < recipe.fresh
        rows = again.view(-1, 1, 1, 1)
        with torch.no_grad():
            fresh = self._fresh(self.model.inject(new.inputs))
        inputs = torch.where(rows.view(-1, *[1] * (inputs.dim() - 1)), new.inputs, inputs)
        targets = torch.where(again.view(-1, *[1] * (targets.dim() - 1)), new.targets, targets)
        return inputs, targets, torch.where(rows, fresh, z)
