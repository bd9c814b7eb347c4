"""How the reasoning models are trained: one table of settings, and the recipes that worked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import timm

from twnn_plugin.errors import nearest

from ..config import SEED_MAX
from ..errors import ConfigError
from .catalog import TASKS, Task, find_task, task_of_model

__all__ = ["METHODS", "RECIPES", "Recipe", "recipe_for"]

_TUPLES = ("free", "graded", "easier")
METHODS = ("phantom", "unrolled", "progressive", "implicit", "plain")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one training; a mistake in them raises :class:`~zoo.errors.ConfigError`.

    Attributes:
        model: its name in timm's registry.
        task: its name in :data:`~zoo.tasks.catalog.TASKS`.
        size: of the training examples, in the task's units.
        method: ``"phantom"``: free steps without gradient from noise or zero, then a few with gradient;
            ``"unrolled"``: from zero, with gradient through every step, as many steps as ``graded`` says;
            ``"progressive"``: Bansal et al. (2022): n free and k graded steps from zero, n + k at most the
            larger number of ``graded``, mixed with the loss after all of them; ``"implicit"``: the
            model's own forward pass and its adjoint; ``"plain"``: the same, for models that do not iterate.
        updates: of the weights.
        batch_size: examples an update.
        lr: learning rate of AdamW after ``warmup`` updates; it falls linearly over the second half.
        warmup: updates.
        clip: norm at which gradients are clipped.
        ema: decay of the moving average of the weights, which is the result.
        noise: share of the starts that are noise of random scale instead of zero (phantom).
        free: fewest and most steps without gradient (phantom).
        graded: fewest and most steps with gradient.
        jacobian: weight of the Jacobian penalty of Bai et al. (2021) at the reached state.
        jacobian_from: share of the updates after which it sets in; from the first one on it can
            collapse the map.
        alpha: weight of the progressive loss against that after all steps.
        drop: share of the positions that a free or graded step leaves as they were, at random.
        beyond: in every second update, at random, up to so many steps without gradient come first (unrolled),
            with ``easier`` once ``size`` itself is trained on: a state that was reached within the graded
            steps must not be left in those after them.
        late: in the same updates, and before that, up to so many steps without gradient on the images without
            their dots (unrolled, pathfinder). Else the network can tell the time by what it writes everywhere
            from the first step on, and misreads what arrives later than any trace did in training.
        carried: share of the gradient with respect to a graded step's result that goes on to the step before
            through what the step computes; what the step left as it was passes all of it on. Below 1 the
            gradient of many steps neither explodes nor is forgotten by a state that latches (as h-detach
            does for LSTMs, Arpit et al. 2019). 1: the true gradient.
        buffer: states kept from update to update, with their examples; 0: every update starts anew (phantom).
        fresh: share of the buffer that is started anew at each use.
        easier: smaller sizes, ascending, that are trained on first; see :class:`~zoo.tasks.catalog.Growing`.
            For inputs of one shape (pathfinder). ``graded`` shrinks with the size (unrolled).
        passed: share right of a size's examples, as a running mean, that lets the next of ``easier`` in;
            0: by schedule.
        grown: share of the updates from which on ``size`` itself is trained on, by schedule.
        traced: weight of a second loss: a model with ``questions=2`` is to answer wherever a dash is whether
            its contour has a dot, and whether such a contour ends there without one (pathfinder;
            :func:`~zoo.tasks.objectives.traced_loss`). The classifier reads the answers.
        apart: the gradient of the classifier stays in the classifier; what is traced alone teaches the rest.
        pixels: height and width of the images (pathfinder); None: the task's own.
        clutter: dashes in each of the short contours of an image (pathfinder), one number for all sizes;
            None: a third of those in a long one.
        select: updates between looks at validation examples of the same size; the weights that were right
            most often, the latest of equals, are the result. 0: the last ones are.
        seed: of everything random.
        model_kwargs: options of the model.
    """

    model: str = "twnn_prefix"
    task: str = "prefix_sums"
    size: int = 32
    method: str = "phantom"
    updates: int = 1500
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.99
    noise: float = 0.7
    free: tuple[int, int] = (8, 20)
    graded: tuple[int, int] = (1, 6)
    jacobian: float = 0.05
    jacobian_from: float = 0.5
    alpha: float = 0.5
    drop: float = 0.0
    beyond: int = 0
    late: int = 0
    carried: float = 1.0
    buffer: int = 0
    fresh: float = 0.04
    easier: tuple[int, ...] = ()
    passed: float = 0.0
    grown: float = 0.7
    traced: float = 0.0
    apart: bool = False
    pixels: int | None = None
    clutter: int | None = None
    select: int = 0
    seed: int = 0
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.find_task()
        if self.method not in METHODS:
            raise ConfigError(
                f"Unknown method {self.method!r}.{nearest(self.method, METHODS)} There are {METHODS}."
            )
        for name in ("updates", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        for name in ("noise", "jacobian_from", "alpha", "fresh", "grown", "carried"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("ema", "drop"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("warmup", "seed", "jacobian", "buffer", "select", "traced", "beyond", "late"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("seed", self.seed <= SEED_MAX, f"a whole number from 0 to {SEED_MAX}")
        self._require("free", 0 <= self.free[0] <= self.free[1], "fewest and most steps")
        self._require("graded", 1 <= self.graded[0] <= self.graded[1], "fewest and most steps, from 1 on")
        self._require("buffer", not 0 < self.buffer < self.batch_size, "0 or at least the batch size")
        growing = (*self.easier, self.size)
        self._require(
            "easier", list(growing) == sorted(set(growing)), "ascending sizes below the trained one"
        )
        if self.easier and self.task != "pathfinder":
            raise ConfigError(
                f"easier={self.easier} mixes sizes in a batch, and inputs of {self.task} differ in shape "
                "with their size. Leave it out."
            )
        self._require("passed", 0 <= self.passed < 1, "at least 0 and below 1")
        self._require("passed", not self.passed or bool(self.easier), "0 without easier sizes")
        self._require("batch_size", not self.easier or self.batch_size >= 2, "at least 2 with easier sizes")
        if self.traced and (self.task != "pathfinder" or self.method not in ("unrolled", "plain")):
            raise ConfigError(
                f"traced={self.traced} needs marks, which only pathfinder's images have, and the method "
                f"'unrolled' or 'plain'; got {self.task} and {self.method!r}. Leave it out."
            )
        if self.apart and not self.traced:
            raise ConfigError(
                "apart=True leaves the features to what is traced, and traced is 0: nothing would teach "
                "them. Set traced, or leave apart out."
            )
        if self.carried < 1 and self.method not in ("phantom", "unrolled", "progressive"):
            raise ConfigError(
                f"carried={self.carried} is of the gradient through graded steps, which the method "
                f"{self.method!r} has not. Leave it out, or use 'phantom', 'unrolled' or 'progressive'."
            )
        for name in ("beyond", "late"):
            if getattr(self, name) and self.method != "unrolled":
                raise ConfigError(
                    f"{name}={getattr(self, name)} is of the method 'unrolled'; got {self.method!r}, whose "
                    "steps without gradient, if it has any, are its own. Leave it out."
                )
        if self.late and self.task != "pathfinder":
            raise ConfigError(
                f"late={self.late} needs images without dots, which only pathfinder has; got {self.task}. "
                "Leave it out."
            )
        if self.buffer and self.method != "phantom":
            raise ConfigError(f"Only the method 'phantom' keeps states; got buffer={self.buffer}.")

    def find_task(self) -> Task:
        """The task that is trained on.

        Raises:
            ConfigError: there is none of this name, or its inputs have no ``pixels`` or ``clutter``.
        """
        return find_task(self.task).painted(self.pixels, self.clutter)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not possible: expected {expected}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), **{name: list(getattr(self, name)) for name in _TUPLES}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`as_dict`."""
        plain: dict[str, Any] = {name: tuple(v) if name in _TUPLES else v for name, v in values.items()}
        return cls(**plain)


_MAZES: dict[str, Any] = {
    "task": "mazes",
    "size": 9,
    "method": "unrolled",
    "updates": 2000,
    "graded": (10, 36),
    "jacobian": 0.0,
    "select": 100,
    "clip": 0.5,
}
_PLAIN: dict[str, Any] = {"method": "plain", "jacobian": 0.0}
_IMAGES: dict[str, Any] = {
    "task": "pathfinder",
    "size": 14,
    "easier": tuple(range(2, 14)),
    "passed": 0.87,
    "graded": (8, 14),
    "updates": 9000,
    "warmup": 100,
    "lr": 2e-3,
    "clip": 0.5,
    "jacobian": 0.0,
}

RECIPES: dict[str, Recipe] = {
    recipe.model: recipe
    for recipe in (
        Recipe(model="twnn_prefix"),
        Recipe(model="rnn_prefix", method="progressive", graded=(1, 20), jacobian=0.0),
        Recipe(model="ff_prefix", **_PLAIN),
        Recipe(model="deq_prefix", method="implicit", jacobian=0.0),
        Recipe(model="twnn_maze", **_MAZES),
        Recipe(model="rnn_maze", **{**_MAZES, "method": "progressive"}),
        Recipe(model="ff_maze", **{**_MAZES, **_PLAIN}),
        Recipe(model="twnn_pathfinder", method="unrolled", **_IMAGES),
        Recipe(model="ff_pathfinder", method="plain", **_IMAGES),
        Recipe(model="deq_maze", **{**_MAZES, "method": "implicit"}),
    )
}
"""What each model is trained with unless one says otherwise."""


def recipe_for(model: str, **changes: Any) -> Recipe:
    """The recipe of a model with some settings changed.

    Raises:
        ConfigError: no recipe for this model, an unknown setting or an impossible value.
    """
    known = [item.name for item in fields(Recipe)]
    for name in changes:
        if name not in known:
            raise ConfigError(f"A recipe has no setting {name!r}.{nearest(name, known)}")
    if model not in RECIPES:
        task, plain = task_of_model(model), model.split(".")[0]
        hint = nearest(plain, RECIPES)
        if task is not None and plain not in RECIPES and timm.is_model(plain):
            hint = f" Its task, {task.name}, is trained otherwise."
        raise ConfigError(f"No recipe for {model!r}.{hint} Recipes: {', '.join(RECIPES)}.")
    return replace(RECIPES[model], **changes)


assert all(recipe.task in TASKS for recipe in RECIPES.values())
