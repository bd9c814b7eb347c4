"""The tasks by name: their sizes, their examples, and a stream of training batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from twnn_plugin.errors import nearest

from ..errors import ConfigError
from .examples import Examples, joined
from .mazes import mazes
from .pathfinder import pathfinder
from .prefix import prefix_sums

__all__ = [
    "SIZES",
    "TASKS",
    "Growing",
    "Task",
    "check_model",
    "find_task",
    "passes",
    "stream",
    "task_of_model",
    "task_size",
]

_CHUNK = 2048
_APART = 1_000_003  # between the seeds of two streams of one training


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: what users type after ``--dataset``.
        draw: ``draw(size, count, seed, split)``.
        size: what a size counts.
        trained: the size that is trained on.
        tested: sizes that are tested.
        models: endings of the names of its models.
        measures: its difficulties, in words.
    """

    name: str
    draw: Callable[[int, int, int, str], Examples]
    size: str
    trained: int
    tested: tuple[int, ...]
    models: str
    measures: dict[str, str]

    def painted(self, pixels: int | None = None, clutter: int | None = None) -> Task:
        """The task with images of another resolution, or with other clutter; None: its own.

        Raises:
            ConfigError: what it draws has none.
        """
        chosen = {key: v for key, v in (("pixels", pixels), ("clutter", clutter)) if v is not None}
        if not chosen:
            return self
        if self.draw is not pathfinder:
            said = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
            raise ConfigError(
                f"{self.name} has no images of a chosen resolution or clutter; got {said}. Leave it out."
            )
        return replace(self, draw=partial(pathfinder, **chosen))


TASKS = {
    task.name: task
    for task in (
        Task(
            "prefix_sums",
            prefix_sums,
            "bits",
            32,
            (32, 44, 128, 512, 4096),
            "_prefix",
            {"ones": "number of 1s", "run": "longest run of equal bits"},
        ),
        Task(
            "mazes",
            mazes,
            "units along a side",
            9,
            (9, 13, 33, 59, 201),
            "_maze",
            {
                "path": "length of the path",
                "dead_end": "depth of the deepest dead end",
                "reach": "largest distance from an end",
            },
        ),
        Task(
            "pathfinder",
            pathfinder,
            "dashes in a contour",
            14,
            (6, 9, 14),
            "_pathfinder",
            {"turning": "sum of the contour's turns"},
        ),
    )
}


SIZES = {"prefix_sums": "bits", "mazes": "maze_size", "pathfinder": "contour_length"}
"""The option that gives the size, by task."""


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: there is none; the message has the nearest one.
    """
    if name not in TASKS:
        raise ConfigError(f"Unknown task {name!r}.{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}.")
    return TASKS[name]


def task_of_model(model: str) -> Task | None:
    """The task that a model is made for, by its name; ``None`` for a model of images and classes."""
    plain = model.split(".")[0]
    return next((task for task in TASKS.values() if plain.endswith(task.models)), None)


def stream(task: Task, size: int, batch_size: int, seed: int) -> Iterator[Examples]:
    """Training batches without end, never the same example on purpose; a function of the arguments."""
    chunk = 0
    while True:
        own = int(np.random.SeedSequence([seed, chunk]).generate_state(1)[0])
        examples = task.draw(size, max(_CHUNK // batch_size, 1) * batch_size, own, "train")
        for first in range(0, len(examples), batch_size):
            yield examples[torch.arange(first, first + batch_size)]
        chunk += 1


def task_size(task: Task, options: Mapping[str, Any], default: int) -> int:
    """The size that was asked for.

    Raises:
        ConfigError: the option of another task was given.
    """
    for name, option in SIZES.items():
        if name != task.name and options.get(option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for {name}; {task.name} takes "
                f"--{SIZES[task.name].replace('_', '-')}."
            )
    chosen = options.get(SIZES[task.name])
    return default if chosen is None else chosen


def check_model(model: str) -> None:
    """Hold a name against timm's registry.

    Raises:
        ConfigError: there is no such model; the message has the nearest one.
    """
    if ":" in model or timm.is_model(model):  # with a colon: weights on a hub or in a folder
        return
    near = nearest(model.split(".")[0], timm.list_models())
    raise ConfigError(f"Unknown model {model!r}.{near} See 'twnn list models'.")


class Growing:
    """Training batches without end whose examples grow: a function of the arguments and of ``passes``.

    The first half of a batch is of the present size, the other half of one drawn from the sizes so far.

    Args:
        task: what is drawn.
        sizes: at least two, ascending; the last one is what is trained for.
        updates: batches that will be taken.
        batch_size: examples a batch.
        seed: of examples and sizes.
        passed: the share of the present size's examples that must be right, as a running mean over some 30
            batches, before the next size is let in; see :meth:`tell`. 0: by schedule, each size for a share
            of the updates in proportion to itself.
        grown: the share of the updates from which on the last size is trained on, by schedule.

    Attributes:
        size: the present size, of the batch that was given last.
        right: the running mean.
        passes: the numbers of batches after which a size was passed.
    """

    _SLOWLY, _AGAIN = 0.03, 0.6

    def __init__(
        self,
        task: Task,
        sizes: Sequence[int],
        updates: int,
        batch_size: int,
        seed: int,
        passed: float = 0.0,
        grown: float = 0.7,
    ):
        self.sizes, self.size, self.passed = tuple(sizes), sizes[0], passed
        self.right = 0.0
        self.passes: list[int] = []
        self._half = half = batch_size // 2
        self._present = {s: stream(task, s, half, seed) for s in self.sizes}
        self._before = {s: stream(task, s, batch_size - half, seed + _APART) for s in self.sizes}
        self._random = np.random.default_rng([seed, 7])
        if not passed:
            summed = np.cumsum(self.sizes[:-1])
            self.passes = [math.ceil(grown * updates * float(s) / float(summed[-1])) for s in summed]
        self._taken = 0

    def __iter__(self) -> Growing:
        return self

    def __next__(self) -> Examples:
        place = sum(self._taken >= end for end in self.passes)
        self.size = self.sizes[place]
        other = self.sizes[int(self._random.integers(place + 1))]
        self._taken += 1
        return joined(next(self._present[self.size]), next(self._before[other]))

    def tell(self, right: Tensor) -> None:
        """Say which examples of the last batch were right, (B,) bool; by schedule nothing follows."""
        if not self.passed or self.size == self.sizes[-1]:
            return
        now = float(right[: self._half].double().mean())
        self.right += self._SLOWLY * (now - self.right)
        if self.right >= self.passed:
            self.right = self._AGAIN * self.passed
            self.passes.append(self._taken)


def passes(examples: Examples, batch_size: int, seed: int) -> Iterator[Examples]:
    """Batches of examples at hand without end, shuffled anew for every pass.

    Raises:
        ConfigError: there are fewer examples than a batch holds.
    """
    if len(examples) < batch_size:
        raise ConfigError(f"A batch of {batch_size} is more than the {len(examples)} examples there are.")
    random = np.random.default_rng([seed, 6])
    while True:
        order = torch.from_numpy(random.permutation(len(examples)))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            yield examples[order[first : first + batch_size]]
