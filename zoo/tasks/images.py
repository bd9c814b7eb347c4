"""Pathfinder as a data set of images and classes, for the ordinary training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..data import ArraySplit, DataSpec, DataSplits
from ..distributed import pick_device
from ..errors import ConfigError
from ..runlog import prepare_folder
from .catalog import check_model, find_task, task_size
from .examples import Examples
from .pathfinder import pathfinder

__all__ = ["complete_pathfinder", "pathfinder_data", "pathfinder_splits"]

_SIDE = 32  # pixels, unless one says otherwise


def complete_pathfinder(own: Mapping[str, Any], options: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Fill in the data set of an ordinary training on Pathfinder: its name, length and resolution.

    Args:
        own: the options of generated tasks.
        options: the others; the data set is written here.
        given: those that were typed.

    Raises:
        ConfigError: an option that would do nothing.
    """
    model, task = options["model"], find_task("pathfinder")
    check_model(model)
    for name in ("updates", "method"):
        if own[name] is not None:
            raise ConfigError(f"{model} is trained like an image model: --epochs, not --{name}.")
    if given.get("dataset") not in (None, task.name):
        raise ConfigError(f"{model} is trained on pathfinder; got --dataset {given['dataset']}.")
    if options["data_dir"] is not None:
        raise ConfigError("Pathfinder images are generated; --data-dir does not apply.")
    options["dataset"] = task.name
    options["contour_length"] = task_size(task, own, task.trained)
    options["img_size"] = options["img_size"] or _SIDE


def pathfinder_data(config: TrainConfig) -> DataSplits:
    """The images that a training on Pathfinder is set to, generated.

    Raises:
        ConfigError: its folder cannot be written to, or its device not used: known before half a minute of
            drawing.
    """
    pick_device(config.device)
    if config.output is not None:
        prepare_folder(Path(config.output))
    length = config.contour_length or find_task("pathfinder").trained
    return pathfinder_splits(length, pixels=config.img_size or _SIDE)


def pathfinder_splits(
    length: int = 14, train: int = 20_000, held_out: int = 2_000, seed: int = 0, pixels: int = 32
) -> DataSplits:
    """Pathfinder images in the three parts that :func:`zoo.train.train` takes.

    Args:
        length: dashes in a contour.
        train: training images.
        held_out: validation images, and as many test images.
        seed: of the images.
        pixels: height and width.
    """
    parts = [
        _split(pathfinder(length, count, seed, split, pixels))
        for split, count in (("train", train), ("val", held_out), ("test", held_out))
    ]
    # As they are: twnn eval draws the same images without this detour.
    spec = DataSpec("pathfinder", 2, 1, pixels, (0.0,), (1.0,), f"generated, contours of {length} dashes")
    return DataSplits(spec, *parts)


def _split(examples: Examples) -> ArraySplit:
    return ArraySplit((examples.inputs * 255).round().to(torch.uint8), examples.targets)
