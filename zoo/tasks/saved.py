"""What a run has written about itself: the settings that go with its weights or its interrupted state."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import LAST, load_checkpoint, read_weights
from ..errors import CheckpointError

__all__ = ["ARGS", "WEIGHTS_FILE", "Saved", "resumed_model", "saved_settings"]

ARGS, WEIGHTS_FILE = "args.json", "model.safetensors"


@dataclass(frozen=True)
class Saved:
    """Settings of the run that a checkpoint belongs to; ``None`` and empty where it does not say.

    Attributes:
        model: its name.
        model_kwargs: its options.
        size: of the examples it was trained on, in the task's units.
        pixels: height and width of its images.
        clutter: dashes in each of their short contours.
    """

    model: str | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    pixels: int | None = None
    clutter: int | None = None

    def is_of(self, model: str) -> bool:
        """Whether ``model`` is what was trained; the tag of published weights does not matter."""
        return self.model is not None and self.model.split(".")[0] == model.split(".")[0]


def saved_settings(path: Path) -> Saved:
    """The settings of a run from one of its checkpoints, or from ``args.json`` beside its final weights.

    Args:
        path: a checkpoint of ours, finished or interrupted, or bare weights, which say nothing.

    Raises:
        CheckpointError: the file is missing or corrupt, or what lies beside it is.
    """
    _, values = read_weights(path)
    if values is None:
        values = _beside(path) if path.name == WEIGHTS_FILE else _recipe(path)
    values = _checked(values, path)
    return Saved(
        values.get("model"),
        dict(values.get("model_kwargs") or {}),
        values.get("size", values.get("contour_length")),  # as a recipe says it, as a TrainConfig does
        values.get("pixels", values.get("img_size")),
        values.get("clutter"),
    )


def _checked(values: Any, path: Path) -> dict[str, Any]:
    """Settings, if they can be those of a run."""
    good = isinstance(values, dict) and isinstance(values.get("model"), str | None)
    if not good or not isinstance(values.get("model_kwargs"), dict | None):
        raise CheckpointError(
            f"The settings in {path} are not those of a run: expected a model's name and its options; got "
            f"{values!r:.80}."
        )
    return values


def _recipe(path: Path) -> dict[str, Any]:
    """The recipe in the state of an interrupted run; empty for any other file with weights."""
    try:
        return dict(load_checkpoint(path, ("format", "recipe"))["recipe"])
    except CheckpointError:  # it could be read before, so that it is no such state
        return {}


def _beside(path: Path) -> dict[str, Any]:
    """The recipe beside the weights of a finished run; empty if there is none."""
    file = path.with_name(ARGS)
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} should hold the settings that go with {path.name} and cannot be read ({error}). Move it "
            "away, and give --model and its options."
        ) from None
    return values if isinstance(values, dict) and "task" in values else {}


def resumed_model(resume: str | None, output: str | None) -> str | None:
    """The model of the run that is to be resumed.

    Args:
        resume: a checkpoint, a run's folder, ``"auto"``, or ``None`` for a new run.
        output: the run's folder, where ``"auto"`` looks.

    Returns:
        Its name; ``None`` if there is nothing to resume, or nothing that says it.

    Raises:
        CheckpointError: the checkpoint is corrupt or holds bare weights.
    """
    named = output if resume == "auto" else resume
    if resume is None or named is None:
        return None
    path = Path(named)
    path = path / LAST if resume == "auto" or path.is_dir() else path
    if not path.is_file():  # the settings of a finished run are in its folder
        return _beside(path.with_name(WEIGHTS_FILE)).get("model")
    state = load_checkpoint(path, ("format",))
    return _checked(state.get("recipe") or state.get("config") or {}, path).get("model")
