"""``twnn train`` and ``twnn eval`` for the tasks that need depth: from options to files and figures."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import twnn_plugin as tw

from ..build import create, fill_in
from ..checkpoint import LAST, load_checkpoint, read_weights, save_checkpoint
from ..distributed import pick_device
from ..errors import CheckpointError, ConfigError
from ..evaluate import autocast
from ..models.reasoning import WEIGHTS
from ..progress import Bar
from ..runlog import METRICS, alone, output_folder
from .catalog import SIZES, Task, check_model, find_task, task_of_model, task_size
from .examples import Examples
from .files import read_examples
from .recipe import Recipe, recipe_for
from .saved import ARGS, WEIGHTS_FILE, Saved, saved_settings
from .scoring import score
from .training import Trained, train_task
from .weights import save_weights

__all__ = [
    "WEIGHTS_FILE",
    "evaluate_task",
    "load_model",
    "provenance",
    "score_rows",
    "train_from_options",
]

SOLVE_OPTIONS = ("solver", "adjoint", "tol", "max_iter", "stop", "norm")
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


def train_from_options(options: Mapping[str, Any], given: Mapping[str, Any], console: Any) -> str:
    """Train one of the models of :mod:`zoo.tasks` and write its folder.

    Args:
        options: all options of ``twnn train`` by name.
        given: those that were typed.
        console: for progress.

    Returns:
        What to tell the user.

    Raises:
        ConfigError: a setting that these trainings do not have, or an impossible one; or a folder that
            cannot be written to.
        CheckpointError, DataError: see there.
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
        saved = _recipe_of(state, output)
        if saved.model != model:
            raise ConfigError(f"{output} holds a run of {saved.model}, not of {model}.")
        chosen = {**changes, **({} if options.get(SIZES[task.name]) is None else {"size": size})}
        recipe = replace(saved, **chosen)  # settings that are not given are those of the run
    with output_folder(output), alone(output):
        return _train(recipe, task, options, output, state, console)


def _recipe_of(state: Mapping[str, Any], folder: Path) -> Recipe:
    """The recipe in a checkpoint.

    Raises:
        CheckpointError: there is none that this version knows.
    """
    try:
        return Recipe.from_dict(state["recipe"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The run in {folder} was begun with settings that this version does not have: {error}. Resume "
            "it with the version that began it, or choose another --output."
        ) from error


def _train(
    recipe: Recipe,
    task: Task,
    options: Mapping[str, Any],
    output: Path,
    state: dict[str, Any] | None,
    console: Any,
) -> str:
    """Train, look at held-out examples, write the folder; what to tell the user."""
    data, held_out = _examples(task, options["data_dir"], recipe.size)

    def save(state: dict[str, Any]) -> None:
        save_checkpoint({**state, "data": _digest(data)}, output / LAST)

    if state is not None and state["data"] != _digest(data):
        raise ConfigError("The interrupted run had other examples: resume it with the same --data-dir.")
    device = pick_device(options["device"])
    try:
        trained = train_task(recipe, data=data, console=console, state=state, save=save, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{output}: {error}") from error
    if held_out is None:
        held_out = task.draw(recipe.size, _SAMPLES, recipe.seed, "val")
    figures = {**score(trained.model, held_out).figures(), "data": options["data_dir"] or "generated"}
    try:
        _write(trained, recipe, figures, output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The training is done, but its results cannot be written into {output}: {error}. Make room, "
            "then go on from what was saved on the way (--resume auto)."
        ) from None
    source = "" if data is None else f" from {options['data_dir']}"
    return (
        f"Trained {recipe.model} on {task.name} ({recipe.size} {task.size}): {recipe.updates} updates in "
        f"{trained.seconds:.1f} s, {figures['right']:.2%} of {figures['samples']} validation examples"
        f"{source} entirely right. "
        f"Next: twnn eval --model {recipe.model} --checkpoint {shlex.quote(str(output / WEIGHTS_FILE))}"
    )


def _write(trained: Trained, recipe: Recipe, figures: Mapping[str, Any], output: Path) -> None:
    """Settings, losses, validation figures and weights of a finished run."""
    lines: list[dict[str, Any]] = []
    for update in sorted({*range(_LINE_EVERY, recipe.updates + 1, _LINE_EVERY), recipe.updates}):
        recent = trained.losses[max(0, update - _LINE_EVERY) : update]
        lines.append({"update": update, "loss": sum(recent) / len(recent)})
    (output / ARGS).write_text(json.dumps(recipe.as_dict(), indent=2) + "\n", encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / METRICS).write_text(text, encoding="utf-8")
    (output / "validation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    save_weights(trained.model, output / WEIGHTS_FILE)
    (output / LAST).unlink(missing_ok=True)  # it could only be resumed to what is there now


def _folder(options: Mapping[str, Any], name: str) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and the state to go on from when there is one to resume.

    Raises:
        ConfigError: the folder holds a finished run, or an interrupted one that nobody asked to resume.
        CheckpointError: there is nothing to resume at the path that was named, or it is not readable.
    """
    resume, output = options["resume"], options["output"]
    if resume in (None, "auto"):
        folder = Path(output or Path("output") / name)
        path = folder / LAST
    else:
        path = Path(resume)
        path = path / LAST if path.is_dir() else path
        folder = path.parent
        if output is not None and Path(output).resolve() != folder.resolve():
            raise ConfigError(f"A resumed run goes on in its own folder {folder}, not in {output}.")
        if not path.is_file():
            done = f" The run in {folder} is finished." if (folder / WEIGHTS_FILE).is_file() else ""
            raise CheckpointError(f"There is no checkpoint {path} to resume from.{done}")
    if (folder / WEIGHTS_FILE).exists():
        raise ConfigError(f"{folder} already holds a run that is finished. Choose another --output.")
    if not path.is_file():
        return folder, None
    if resume is None:
        raise ConfigError(
            f"{folder} holds an interrupted run. Go on with it (--resume auto), or choose another --output."
        )
    return folder, load_checkpoint(path, _STATE)


def _digest(data: Examples | None) -> str:
    """What tells one set of examples from another; empty for examples that are drawn."""
    if data is None:
        return ""
    digest = hashlib.sha256(data.inputs.numpy().tobytes())
    digest.update(data.targets.numpy().tobytes())
    return digest.hexdigest()


def _examples(task: Task, data_dir: str | None, size: int) -> tuple[Examples, Examples] | tuple[None, None]:
    """Training examples of the benchmark's files, and some held-out ones; None where they are drawn."""
    if data_dir is None:
        return None, None
    data, held_out = (read_examples(task.name, data_dir, size, split) for split in ("train", "val"))
    return data, held_out[slice(0, _SAMPLES)]


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


def load_model(
    name: str, checkpoint: str | Path | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, str]:
    """A reasoning model with weights, in eval mode, and where these are from.

    Args:
        name: of the model.
        checkpoint: the weights; None: those that ship with the package.
        model_kwargs: its options; those of the run that the checkpoint belongs to need not be said again.

    Raises:
        ConfigError: there is no such model, there are no weights, or it cannot be built with these options.
        CheckpointError: the weights are unreadable, or of another model or one with other options.
    """
    check_model(name)
    options = {**_saved(name, checkpoint).model_kwargs, **(model_kwargs or {})}
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


def _saved(name: str, checkpoint: str | Path | None) -> Saved:
    """What the checkpoint says about its run; nothing if that was of another model."""
    saved = Saved() if checkpoint is None else saved_settings(Path(checkpoint))
    return saved if saved.is_of(name) else Saved()


def evaluate_task(options: Mapping[str, Any], console: Any = None) -> tuple[str, dict[str, Any]]:
    """Whole answers, statuses and steps of a reasoning model.

    What is not given of the model's options, the size and the resolution is that of the checkpoint's run, and
    so is the clutter.

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
    _check_together(options, task)
    saved = _saved(name, options["checkpoint"])
    size = task_size(task, options, saved.size or task.trained)
    pixels = options["img_size"] or saved.pixels
    task = task.painted(pixels, saved.clutter)
    device = pick_device(options["device"])
    model, source = load_model(name, options["checkpoint"], options["model_kwargs"])
    model = model.to(device)
    solve = {key: options[key] for key in SOLVE_OPTIONS if options[key] is not None}
    if solve:
        tw.configure(model, **solve)
    examples = _drawn_or_read(task, size, options)
    batch = max(1, min(options["batch_size"], _PIXELS_AT_A_TIME // examples.inputs[0].numel()))
    with Bar(console, "evaluating", len(examples)) as bar, autocast(device, options["amp"]):
        figures = score(model, examples, batch, bar.advance).figures()
    about = {
        "model": name,
        "weights": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "task": task.name,
        "size": size,
        "split": options["split"],
        **({"seed": options["seed"] or 0} if options["data_dir"] is None else {}),
        "data": options["data_dir"] or "generated",
        "device": str(device),
        **({"img_size": pixels} if pixels is not None else {}),
        **({"clutter": saved.clutter} if saved.clutter is not None else {}),
        **({"amp": True} if options["amp"] else {}),
        **solve,
    }
    return f"{name} ({source}) on {task.name}, {size} {task.size} ({options['split']})", {**about, **figures}


def _check_together(options: Mapping[str, Any], task: Task) -> None:
    """``ConfigError`` for options of ``twnn eval`` that would do nothing."""
    name = options["model"]
    if options["dataset"] not in (None, task.name):
        raise ConfigError(f"{name} is evaluated on {task.name}; got --dataset {options['dataset']}.")
    if options["img_size"] is not None and task.name != "pathfinder":
        raise ConfigError(f"--img-size does not apply; say --{SIZES[task.name].replace('_', '-')}.")
    if options["data_dir"] is not None and options["seed"] is not None:
        raise ConfigError(
            f"--seed {options['seed']} chooses among generated examples; those in --data-dir are as they "
            "are. Leave one of the two out."
        )
    if options["pretrained"] and options["checkpoint"] is not None:
        raise ConfigError(
            "--pretrained and --checkpoint both say which weights to take: leave one of the two out."
        )


def _drawn_or_read(task: Task, size: int, options: Mapping[str, Any]) -> Examples:
    """The examples to evaluate on."""
    if options["data_dir"] is None:
        return task.draw(size, options["samples"] or _SAMPLES, options["seed"] or 0, options["split"])
    examples = read_examples(task.name, options["data_dir"], size, options["split"])
    return examples[slice(0, options["samples"])]


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
