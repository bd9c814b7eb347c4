"""The command ``twnn``: ``demo``, ``list``, ``train``, ``eval``.

torch, timm and the rest are imported inside the commands: ``twnn --help`` answers at once, and a
misspelled option is refused before anything heavy is loaded.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .config import SEED_MAX, TrainConfig, check_same_run
from .errors import ConfigError, ZooError
from .options import (
    TASK_OPTIONS,
    Numbers,
    config_options,
    expand_model_kwargs,
    explicit_values,
    parse_model_kwargs,
    refuse_task_options,
    task_options,
)

if TYPE_CHECKING:
    from .train import TrainResult

__all__ = ["main"]

LIST_KINDS = ("models", "solvers", "linear_solvers", "adjoints", "blocks", "gates", "policies", "backbones")


def _is_users(error: Exception) -> bool:
    """Whether ``error`` tells a user about a mistake of theirs; everything else keeps its traceback."""
    if isinstance(error, ZooError):
        return True
    # Looked up, not imported: if the package was never loaded, the error cannot be one of its own.
    ours = sys.modules.get("twnn_plugin.errors")
    if ours is None:
        return False
    return isinstance(error, (ours.UnknownNameError, ours.OptionError, ours.AttachError, ours.MapError))


class OneLine(click.Group):
    """A group that reports bad input as one line on stderr, with exit code 2."""

    def main(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, prog_name: str | None = "twnn", **extra: Any
    ) -> Any:
        """Run the command and exit; with ``standalone_mode=False`` errors are raised instead."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            sys.exit(super().main(args, prog_name, standalone_mode=False, **extra) or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.ClickException as error:
            place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "twnn"
            _fail(f"{error.format_message()} See '{place} --help'.")
        except (KeyboardInterrupt, click.Abort) as error:
            cause = error.__cause__ or error  # click raises its own exception from Ctrl-C's
            click.echo(" ".join(["Interrupted.", *getattr(cause, "__notes__", [])]), err=True)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as in 'twnn list | head'
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if not _is_users(error):
                raise
            _fail(str(error))


def _fail(message: str) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(2)


class WithModelKwargs(click.Command):
    """A command whose ``--model-kwargs`` takes several NAME=VALUE, as timm's script does.

    An option that is both a setting of a run and one of generated tasks (``--contour-length``) is there once.
    """

    def __init__(self, name: str | None, *, params: list[click.Parameter] | None = None, **extra: Any):
        once = {param.name: param for param in params or []}
        super().__init__(name, params=list(once.values()), **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option for each value, which is what click can read."""
        return super().parse_args(ctx, expand_model_kwargs(args))


@click.group(
    "twnn",
    cls=OneLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="twnn-plugin")
def main() -> None:
    """Wormhole networks: train them, evaluate them, swap their solvers by name."""


@main.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="twnn-demo", show_default=True
)
@click.option("--quick", is_flag=True, help="A much shorter run, to see that everything works.")
@click.option(
    "--seed", type=click.IntRange(0, SEED_MAX - 2), default=0, show_default=True
)  # and the next two
def demo(out: Path, quick: bool, seed: int) -> None:
    """Train small networks on real digits and compare them under every solver.

    Writes report.md, metrics.json and plots into the folder --out.
    """
    from .demo import run

    run(out, seed, quick, _console())


@main.command("list")
@click.argument("kind", type=click.Choice(LIST_KINDS), required=False)
def list_names(kind: str | None) -> None:
    """Show what can be used by name: KIND, or all kinds, each with its owner and one line."""
    from twnn_plugin import kernels

    from .listing import rows

    for one in (kind,) if kind else LIST_KINDS:
        _print_table(one.replace("_", " ").capitalize(), ("name", "owner", "what it is"), rows(one))
        if one == "solvers":
            click.echo(f"Compiled kernels for solves on the CPU: {kernels.describe()}.")


@main.command(cls=WithModelKwargs)
@config_options
@task_options(training=True)
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Train any timm model, ours included, on images or on text.

    With --policy dynalay an agent learns which layers of a dynalay_ model to iterate for which sample (the
    default model then: dynalay_cnn3, or dynalay_lstm3 for text such as --dataset kjv-small).

    Models of generated tasks (twnn_prefix, twnn_maze, ff_prefix, ...) are trained on examples drawn as they
    are needed, or on the deep-thinking benchmark's files in --data-dir; twnn_pathfinder on generated images.

    The run's folder (--output, by default output/MODEL-DATASET) gets args.json, metrics.jsonl,
    TensorBoard events, last.pth.tar and best.pth.tar. With --resume, settings that are not given are
    those of the checkpoint. Several GPUs: torchrun --nproc-per-node N -m zoo.cli train ...
    """
    try:
        message = _train(ctx, options)
    except KeyboardInterrupt as error:
        error.add_note("What was saved goes on with --resume auto.")
        raise
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(message)


def _train(ctx: click.Context, options: dict[str, Any]) -> str:
    """Train by the kind of model; what to tell the user."""
    from .tasks.catalog import check_model, task_of_model

    given = explicit_values(ctx, options)
    _take_resumed_model(options, given)
    model = options["model"]
    task = task_of_model(model)
    if task is not None and task.name != "pathfinder":
        from .tasks.run import train_from_options

        options["model_kwargs"] = parse_model_kwargs(options["model_kwargs"])
        return train_from_options(options, explicit_values(ctx, options), _console())
    from .train import train as run

    own = {name: options.pop(name) for name in TASK_OPTIONS if name in options and name != "seed"}
    if task is not None:
        from .tasks.images import complete_pathfinder, pathfinder_data

        complete_pathfinder(own, options, given)
        config = _train_config(ctx, options)
        return _told(config, run(config, data=pathfinder_data(config), console=_console()))
    if any(value is not None for value in own.values()):
        check_model(model)
    refuse_task_options(own, model, own)
    _choose_model(options, given)
    config = _train_config(ctx, options)
    return _told(config, run(config, console=_console()))


def _told(config: TrainConfig, result: TrainResult) -> str:
    """What an ordinary training ended with, and what comes next."""
    from .data.text_specs import is_text, text_name

    best = f"accuracy {100 * result.best_metric:.2f} %"
    if is_text(config.dataset) and text_name(config.dataset).task == "language":
        best = f"perplexity {1 / result.best_metric if result.best_metric else math.inf:.2f}"
    return (
        f"Trained {config.model} on {config.dataset}: {result.updates} updates in "
        f"{result.seconds:.1f} s, best validation {best} in epoch {result.best_epoch + 1}. "
        f"Next: twnn eval --checkpoint {shlex.quote(str(result.best_checkpoint))}"
    )


def _take_resumed_model(options: dict[str, Any], given: dict[str, Any]) -> None:
    """Where a run is resumed: its model, by which the kind of the training is told."""
    from .tasks.saved import resumed_model

    model = resumed_model(options["resume"], options["output"])
    if model is None:
        return
    if given.get("model") not in (None, model):
        where = options["output"] if options["resume"] == "auto" else options["resume"]
        raise ConfigError(
            f"{where} holds a run of {model}, not of {given['model']}. Leave --model out to go on with it, "
            "or begin another run in another folder (--output)."
        )
    options["model"] = model


def _choose_model(options: dict[str, Any], given: dict[str, Any]) -> None:
    """Where no model was named: one for the kind of data and of policy."""
    if "model" in given:
        return
    from .construct import default_model

    options["model"] = default_model(options["dataset"], options["policy"]) or options["model"]


def _train_config(ctx: click.Context, options: dict[str, Any]) -> TrainConfig:
    """Settings from the command line, on top of those of the checkpoint when there is one to resume."""
    from .checkpoint import load_checkpoint
    from .train import resume_path

    options["model_kwargs"] = parse_model_kwargs(options["model_kwargs"])
    options["policy_kwargs"] = parse_model_kwargs(options["policy_kwargs"], "--policy-kwargs")
    given = explicit_values(ctx, options)
    by_path = options["resume"] not in (None, "auto")
    if options["output"] is None and not by_path:
        options["output"] = str(Path("output") / _run_name(options["model"], options["dataset"]))
    config = TrainConfig.from_dict(options)
    path = resume_path(config)
    if path is None:
        return config
    values = load_checkpoint(path)["config"]
    saved = TrainConfig.from_dict(values)
    config = replace(saved, output=config.output, **{k: v for k, v in given.items() if k != "output"})
    check_same_run(values, config, path)  # before data are drawn for nothing
    return config


def _run_name(model: str, dataset: str) -> str:
    """A folder name without separators."""
    return re.sub(r"[^\w.]+", "_", model) + "-" + re.sub(r"[^\w.]+", "_", dataset)


@main.command("eval", cls=WithModelKwargs)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights and the settings of their run.")
@click.option("--use-ema/--no-use-ema", default=True, show_default=True, help="Prefer the moving average.")
@click.option("--model", help="Model (default: the checkpoint's).")
@click.option("--model-kwargs", multiple=True, metavar="NAME=VALUE...", help="Options of the model.")
@click.option("--pretrained", is_flag=True, help="Published weights of the model.")
@click.option("--dataset", help="Data set (default: the checkpoint's, else digits; the task of the model).")
@click.option("--data-dir", help="Folder where the data set is.")
@task_options(training=False)
@click.option("--dataset-download", is_flag=True, help="Fetch the data set if it is not there.")
@click.option("--split", type=click.Choice(("train", "val", "test")), default="test", show_default=True)
@click.option("--img-size", type=click.IntRange(min=1), help="Height and width of the images, in pixels.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")
@click.option("--amp", is_flag=True, help="Mixed precision.")
@click.option("--solver", help="Solve wormholes by this solver ('twnn list solvers').")
@click.option("--adjoint", help="Differentiate wormholes this way ('twnn list adjoints').")
@click.option("--tol", type=float, help="Tolerance of the solve.")
@click.option("--max-iter", type=int, help="Iterations a solve may take.")
@click.option("--stop", type=click.Choice(("rel", "abs")), help="Relative or absolute residual.")
@click.option("--norm", type=click.Choice(("l2", "max")), help="Norm of the residual.")
@click.option("--policy", help="Another policy than the trained one: who is iterated ('twnn list policies').")
@click.option("--policy-kwargs", multiple=True, metavar="NAME=VALUE...", help="Options of --policy.")
@click.option(
    "--cost-weights", type=Numbers(), help="Agents: evaluate at these weights of the cost, as in 0,0.5,1,2."
)
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time forward passes.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write figures here."
)
def evaluate(**options: Any) -> None:
    """Accuracy, calibration, solver steps, open gates and latency of a model.

    Models of generated tasks (twnn_prefix --bits 512, twnn_maze --maze-size 59, ...): whole answers right,
    statuses and steps; with the weights that ship unless there is a --checkpoint, whose options of the model
    and whose size hold where none are given.
    """
    json_file: Path | None = options.pop("json_file")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"The folder of --json {json_file} does not exist; make it first.")
    options["model_kwargs"] = parse_model_kwargs(options["model_kwargs"])
    options["policy_kwargs"] = parse_model_kwargs(options["policy_kwargs"], "--policy-kwargs")
    if options["policy_kwargs"] and options["policy"] is None:
        raise ConfigError("--policy-kwargs are options of a policy; name one with --policy.")
    title, figures, rows = _evaluate(options)
    _print_table(title, ("figure", "value"), rows)
    if figures.get("sweep"):
        from .evalrun import sweep_rows

        _print_table("Without retraining, by what iterating costs", *sweep_rows(figures))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"The figures above are not in --json {json_file}: {error.strerror or error}. Name a file "
                "in a folder that can be written to."
            ) from None


_NOT_FOR_TASKS: dict[str, Any] = {
    "policy": None,
    "cost_weights": None,
    "workers": 0,
    "latency": True,
    "use_ema": True,
    "dataset_download": False,
}
"""Options of ``twnn eval`` that reasoning models have no use for, and what they are when not given."""


def _evaluate(options: dict[str, Any]) -> tuple[str, dict[str, Any], Sequence[Sequence[str]]]:
    """Title, figures and rows of a table, by the kind of model."""
    from .evalrun import evaluate_from_options, figure_rows
    from .tasks.catalog import check_model, task_of_model

    name, checkpoint = options["model"], options["checkpoint"]
    if name is None and checkpoint is not None:
        from .tasks.saved import saved_settings

        name = saved_settings(Path(checkpoint)).model
        if name is None:
            raise ConfigError(f"{checkpoint} does not say which model its weights are of: give --model too.")
    if name is not None and task_of_model(name) is not None:
        from .tasks.run import evaluate_task, score_rows

        for option, unset in _NOT_FOR_TASKS.items():
            if options[option] != unset:
                no = "no-" if unset is True else ""
                raise ConfigError(f"--{no}{option.replace('_', '-')} does not apply to {name}.")
        title, figures = evaluate_task({**options, "model": name}, _console())
        return title, figures, score_rows(figures)
    if name is not None and any(options[option] is not None for option in TASK_OPTIONS if option in options):
        check_model(name)
    refuse_task_options(options, name, TASK_OPTIONS)
    title, figures = evaluate_from_options(options, _console())
    return title, figures, figure_rows(figures)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere wide enough that no name is cut, whatever reads it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False)


if __name__ == "__main__":
    main()
