"""``twnn train`` and ``twnn eval`` for the tasks that need depth: from options to files and figures."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import twnn_plugin as tw

from ..build import create, fill_in
from ..checkpoint import LAST, load_checkpoint, read_weights, save_checkpoint
from ..data import DataSplits
from ..distributed import pick_device
from ..errors import CheckpointError, ConfigError
from ..evaluate import autocast
from ..models.reasoning import WEIGHTS
from ..progress import Bar
from ..runlog import METRICS, prepare_folder
from .catalog import Task, find_task, task_of_model
from .examples import Examples
from .files import read_examples
from .images import pathfinder_splits
from .recipe import Recipe, recipe_for
from .scoring import score
from .training import Trained, train_task
from .weights import save_weights

__all__ = [
    "SIZES",
    "evaluate_task",
    "load_model",
    "pathfinder_data",
    "provenance",
    "score_rows",
    "task_size",
    "train_from_options",
]

SIZES = {"prefix_sums": "bits", "mazes": "maze_size", "pathfinder": "contour_length"}
"""The option that gives the size, by task."""

SOLVE_OPTIONS = ("solver", "adjoint", "tol", "max_iter", "stop", "norm")
WEIGHTS_FILE = "model.safetensors"
_SAMPLES = 1000
_LINE_EVERY = 50
_STATE = (
    "recipe",
    "updates",
    "state_dict",
    "state_dict_ema",
    "optimizer",
    "losses",
    "rng",
    "random",
    "batches",
    "data",
)
_PIXELS_AT_A_TIME = 2**19


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


def train_from_options(options: Mapping[str, Any], given: Mapping[str, Any], console: Any) -> str:
    """Train one of the models of :mod:`zoo.tasks` and write its folder.

    Args:
        options: all options of ``twnn train`` by name.
        given: those that were typed.
        console: for progress.

    Returns:
        What to tell the user.

    Raises:
        ConfigError: a setting that these trainings do not have, or an impossible one.
    """
    model, changes = options["model"], _changes(given)
    recipe = recipe_for(model, **changes)
    task = find_task(recipe.task)
    if given.get("dataset") not in (None, task.name):
        raise ConfigError(f"{model} is trained on {task.name}; got --dataset {given['dataset']}.")
    size = task_size(task, options, recipe.size)
    recipe = recipe_for(model, **changes, size=size)
    output, state = _folder(options, f"{model}-{task.name}")
    if state is not None:
        saved = Recipe.from_dict(state["recipe"])
        if saved.model != model:
            raise ConfigError(f"{output} holds a run of {saved.model}, not of {model}.")
        chosen = {**changes, **({} if options.get(SIZES[task.name]) is None else {"size": size})}
        recipe = replace(saved, **chosen)  # settings that are not given are those of the run
    data = None if options["data_dir"] is None else _files(task, options["data_dir"], recipe.size)

    def save(state: dict[str, Any]) -> None:
        save_checkpoint({**state, "data": _digest(data)}, output / LAST)

    if state is not None and state["data"] != _digest(data):
        raise ConfigError("The interrupted run had other examples: resume it with the same --data-dir.")
    device = pick_device(options["device"])
    trained = train_task(recipe, data=data, console=console, state=state, save=save, device=device)
    return _write(trained, recipe, task, output)


def _write(trained: Trained, recipe: Recipe, task: Task, output: Path) -> str:
    """Weights and figures of a finished run; what to tell the user."""
    lines: list[dict[str, Any]] = []
    for update in sorted({*range(_LINE_EVERY, recipe.updates + 1, _LINE_EVERY), recipe.updates}):
        recent = trained.losses[max(0, update - _LINE_EVERY) : update]
        lines.append({"update": update, "loss": sum(recent) / len(recent)})
    validation = task.draw(recipe.size, _SAMPLES, recipe.seed, "val")
    figures = score(trained.model, validation).figures()
    (output / "args.json").write_text(json.dumps(recipe.as_dict(), indent=2) + "\n", encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / METRICS).write_text(text, encoding="utf-8")
    (output / "validation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    save_weights(trained.model, output / WEIGHTS_FILE)
    (output / LAST).unlink(missing_ok=True)  # it could only be resumed to what is there now
    return (
        f"Trained {recipe.model} on {task.name} ({recipe.size} {task.size}): {recipe.updates} updates in "
        f"{trained.seconds:.1f} s, {figures['right']:.2%} of {_SAMPLES} validation examples entirely right. "
        f"Next: twnn eval --model {recipe.model} --checkpoint {output / WEIGHTS_FILE}"
    )


def _folder(options: Mapping[str, Any], name: str) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and the state to go on from when there is one to resume.

    Raises:
        ConfigError: the folder holds a finished run, or an interrupted one that nobody asked to resume.
        CheckpointError: there is nothing to resume at the path that was named, or it is not readable.
    """
    resume, output = options["resume"], options["output"]
    if resume in (None, "auto"):
        folder = Path(output or Path("output") / name)
    else:
        path = Path(resume)
        folder = path if path.is_dir() else path.parent
        if output is not None and Path(output).resolve() != folder.resolve():
            raise ConfigError(f"A resumed run goes on in its own folder {folder}, not in {output}.")
        if not (folder / LAST).is_file():
            raise CheckpointError(f"There is no checkpoint {folder / LAST} to resume from.")
    prepare_folder(folder)
    if (folder / WEIGHTS_FILE).exists():
        raise ConfigError(f"{folder} already holds a run that is finished. Choose another --output.")
    if not (folder / LAST).is_file():
        return folder, None
    if resume is None:
        raise ConfigError(
            f"{folder} holds an interrupted run. Go on with it (--resume auto), or choose another --output."
        )
    return folder, load_checkpoint(folder / LAST, _STATE)


def _digest(data: Examples | None) -> str:
    """What tells one set of examples from another; empty for examples that are drawn."""
    if data is None:
        return ""
    digest = hashlib.sha256(data.inputs.numpy().tobytes())
    digest.update(data.targets.numpy().tobytes())
    return digest.hexdigest()


def _files(task: Task, data_dir: str, size: int) -> Examples:
    return read_examples(task.name, data_dir, size, "train")


def _changes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the recipe, from options of ``twnn train``; refuses those that would do nothing."""
    names = {"clip_grad": "clip", "model_ema_decay": "ema"}
    direct = ("model_kwargs", "batch_size", "lr", "seed", "updates", "method")
    elsewhere = ("model", "dataset", "output", "resume", "data_dir", "device", *SIZES.values())
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name in direct or name in names:
            changes[names.get(name, name)] = value
        elif name == "epochs":
            raise ConfigError("Examples are drawn without end: say --updates instead of --epochs.")
        elif name not in elsewhere:
            raise ConfigError(
                f"--{name.replace('_', '-')} is no setting of a training on generated examples; those "
                f"are --{', --'.join(sorted(n.replace('_', '-') for n in (*direct, *names)))}."
            )
    return changes


def pathfinder_data(own: Mapping[str, Any], options: dict[str, Any], given: Mapping[str, Any]) -> DataSplits:
    """Generated images for the ordinary training; ``options`` gets the name of the data set.

    Raises:
        ConfigError: an option that would do nothing.
    """
    task = find_task("pathfinder")
    for name in ("updates", "method"):
        if own[name] is not None:
            raise ConfigError(f"{options['model']} is trained like an image model: --epochs, not --{name}.")
    if given.get("dataset") not in (None, task.name):
        raise ConfigError(f"{options['model']} is trained on pathfinder; got --dataset {given['dataset']}.")
    if options["data_dir"] is not None:
        raise ConfigError("Pathfinder images are generated; --data-dir does not apply.")
    options["dataset"] = task.name
    return pathfinder_splits(task_size(task, own, task.trained), pixels=options["img_size"] or 32)


def load_model(
    name: str, checkpoint: str | Path | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, str]:
    """A reasoning model with weights, in eval mode, and where these are from.

    Raises:
        ConfigError: there are no weights, or the model cannot be built with these options.
        CheckpointError: the weights are unreadable, or of another model or one with other options.
    """
    options = dict(model_kwargs or {})
    shipped = WEIGHTS / f"{name.split('.')[0]}.safetensors"
    if checkpoint is None and not shipped.is_file():
        raise ConfigError(f"No weights of {name} ship with the package: train it, then give --checkpoint.")
    model = create(name, options=options)
    path = shipped if checkpoint is None else Path(checkpoint)
    weights, _ = read_weights(path)
    kept = {key: value for key, value in model.state_dict().items() if ".feedback." in key}
    try:
        fill_in(model, {**kept, **weights}, path)
    except CheckpointError:
        if checkpoint is not None:
            raise
        raise CheckpointError(
            f"The weights of {name} that ship with the package do not fit a model with other options; got "
            f"{options}. Leave --model-kwargs out, or train a model with them (twnn train --model {name}) "
            "and give its --checkpoint."
        ) from None
    return model.eval(), "shipped weights" if checkpoint is None else str(checkpoint)


def evaluate_task(options: Mapping[str, Any], console: Any = None) -> tuple[str, dict[str, Any]]:
    """Whole answers, statuses and steps of a reasoning model.

    Args:
        options: the options of ``twnn eval`` by name.
        console: for progress.

    Returns:
        A title, and the figures with the settings beside them.

    Raises:
        ConfigError: options that do not go together.
        CheckpointError, DataError: see there.
    """
    name = options["model"]
    task = task_of_model(name)
    assert task is not None
    if options["dataset"] not in (None, task.name):
        raise ConfigError(f"{name} is evaluated on {task.name}; got --dataset {options['dataset']}.")
    if options["img_size"] is not None and task.name != "pathfinder":
        raise ConfigError(f"--img-size does not apply; say --{SIZES[task.name].replace('_', '-')}.")
    size = task_size(task, options, task.trained)
    if options["img_size"] is not None:
        task = task.painted(options["img_size"])
    device = pick_device(options["device"])
    model, source = load_model(name, options["checkpoint"], options["model_kwargs"])
    model = model.to(device)
    solve = {key: options[key] for key in SOLVE_OPTIONS if options[key] is not None}
    if solve:
        tw.configure(model, **solve)
    count, split = options["samples"] or _SAMPLES, options["split"]
    if options["data_dir"] is not None:
        examples = read_examples(task.name, options["data_dir"], size, split)
        examples = examples[slice(0, options["samples"])]
    else:
        examples = task.draw(size, count, options["seed"] or 0, split)
    pixels = examples.inputs[0].numel()
    batch = max(1, min(options["batch_size"], _PIXELS_AT_A_TIME // pixels))
    with Bar(console, "evaluating", len(examples)) as bar, autocast(device, options["amp"]):
        figures = score(model, examples, batch, bar.advance).figures()
    about = {
        "model": name,
        "weights": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "task": task.name,
        "size": size,
        "split": split,
        "seed": options["seed"] or 0,
        "data": options["data_dir"] or "generated",
        "device": str(device),
        **({"img_size": options["img_size"]} if options["img_size"] is not None else {}),
        **({"amp": True} if options["amp"] else {}),
        **solve,
    }
    return f"{name} ({source}) on {task.name}, {size} {task.size} ({split})", {**about, **figures}


def score_rows(figures: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The figures as a table's rows."""
    rows = [
        ("examples", f"{figures['samples']:,}"),
        ("entirely right", f"{figures['right']:.2%} ({figures['wrong']:,} wrong)"),
        ("positions right", f"{figures['positions_right']:.4%}"),
        ("converged", f"{figures['converged']:.2%} ({figures['not_converged']:,} not)"),
        ("converged and wrong", f"{figures['converged_and_wrong']:,}"),
        ("steps, mean", f"{figures['mean_steps']:.1f}"),
        ("steps, least to most", f"{figures['least_steps']} to {figures['most_steps']}"),
        ("parameters", f"{figures['parameters']:,}"),
    ]
    measures = find_task(figures["task"]).measures
    for name, value in figures["rank_correlation"].items():
        shown = "n/a" if value is None else f"{value:.2f}"
        rows.append((f"rank correlation of steps and {measures[name]}", shown))
    return rows


def provenance() -> dict[str, Any]:
    """Date, versions and hardware, for cards."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
        "hardware": f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})",
    }
