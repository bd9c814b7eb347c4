"""The command line: ``python -m benchmarks NAME``, ``index``, ``--list``."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table as RichTable

from twnn_plugin.errors import nearest

from . import (  # noqa: F401  (they register themselves)
    backward,
    coverage,
    dynalay,
    gpu,
    memory,
    models,
    overhead,
    profile,
    propagation,
    reasoning,
    scaling,
    sequences,
    solvers,
    streaming,
    wormholes,
)
from .everything import ALL, own_settings, run_all
from .harness import REGISTRY, BenchError, Interrupted, PageError, Settings, find, run
from .harness.run import load
from .index import write_index

__all__ = ["main"]


class OneLine(click.Command):
    """A command that reports bad input as one line on stderr, with exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run and exit."""
        extra.pop("standalone_mode", None)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **extra) or 0)
        except click.NoSuchOption as error:
            known = [name for option in self.params for name in option.opts if name.startswith("-")]
            _fail(f"Unknown option {error.option_name}.{nearest(error.option_name, known)}")
        except click.ClickException as error:
            _fail(f"{error.format_message()} See 'python -m benchmarks --help'.")
        except BenchError as error:
            _fail(str(error))
        except PageError as error:
            _fail(str(error), code=1)
        except (KeyboardInterrupt, click.Abort) as error:
            stop = error.__cause__ or error  # click wraps what has interrupted the command
            kept = f" The finished cells are kept: {stop}." if isinstance(stop, Interrupted) else ""
            click.echo(f"Interrupted.{kept}", err=True)
            sys.exit(130)


def _fail(message: str, code: int = 2) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)


def _seeds(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise click.BadParameter(
            f"whole numbers >= 0 with commas between them, such as 0,1,2; got {value!r}."
        )
    return seeds


def _budget(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):  # NaN is in every range, and would not be equal to itself on --resume
        raise click.BadParameter(f"a finite number, such as 0.5 or 2; got {value}.")
    return value


@click.command("benchmarks", cls=OneLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--list", "list_them", is_flag=True, help="Show the benchmarks and their questions.")
@click.option("--quick", is_flag=True, help="Small and short, to see that everything works; needs --out.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seeds", callback=_seeds, default="0", show_default=True, help="Such as 0,1,2.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="torch's threads.")
@click.option(
    "--budget",
    callback=_budget,
    type=click.FloatRange(min=0.01),
    default=1.0,
    show_default=True,
    help="Times more timing (sequences: training).",
)
@click.option(
    "--full", is_flag=True, help="models: all images, the whole training. reasoning: long contours, too."
)
@click.option("--only", multiple=True, help="Cells whose key contains this; may be repeated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results.")
@click.option(
    "--resume",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of an interrupted run ('all': its --out): its finished cells are not run again.",
)
@click.pass_context
def main(
    context: click.Context,
    name: str | None,
    list_them: bool,
    quick: bool,
    device: str,
    seeds: tuple[int, ...],
    threads: int,
    budget: float,
    full: bool,
    only: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
) -> None:
    """Run the benchmark NAME, all of them (NAME 'all'), or make the page of all committed results ('index').

    Results go into a dated folder in benchmarks/results, or into --out: result.json, table.md, plots.
    """
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    if name == "index":
        given = _given(context)
        if given:
            raise BenchError(f"'index' takes no options: leave {', '.join(given)} away.")
        click.echo(write_index())
        return
    if list_them or name is None:
        _list(console)
        if not list_them:
            raise click.UsageError("Say which benchmark to run.")
        return
    if name not in (*REGISTRY, ALL):
        known = [*sorted(REGISTRY), ALL, "index"]
        raise BenchError(f"Unknown benchmark {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    if out is not None and resume is not None:
        raise BenchError("--out and --resume exclude each other: a resumed run goes on in its own folder.")
    if name == "gpu" and context.get_parameter_source("device") == ParameterSource.DEFAULT:
        device = "cuda"
    settings = Settings(device, quick, seeds, threads, only, budget, full)
    words = _without(sys.argv[1:], "--out", "--resume")  # the folder of the results is no part of it

    def command_of(benchmark: str) -> str:
        """The command as anyone would give it for this benchmark alone."""
        own = _own(words, settings, own_settings(REGISTRY[benchmark], settings)) if name == ALL else words
        return shlex.join(["python", "-m", "benchmarks", *(benchmark if w == ALL else w for w in own)])

    if name == ALL:
        sys.exit(1 if run_all(settings, out, command_of, console, resume) else 0)
    folder = run(find(name), settings, out=out, resume=resume, command=command_of(name), console=console)
    cells = load(folder)["cells"]
    failed = [cell["key"] for cell in cells if cell["status"] != "ok"]
    if failed:
        click.echo(
            f"{len(failed)} of {len(cells)} cells failed; --resume {folder} runs them again.", err=True
        )
        sys.exit(1)


def _given(context: click.Context) -> list[str]:
    """The options that were given, as they are called."""
    options = [part for part in context.command.params if isinstance(part, click.Option)]
    return [
        option.opts[0]
        for option in options
        if option.name and context.get_parameter_source(option.name) != ParameterSource.DEFAULT
    ]


def _without(words: list[str], *options: str) -> list[str]:
    """The words of a command without these options and what each is given."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept


def _own(words: list[str], given: Settings, own: Settings) -> list[str]:
    """The words of ``all`` without what was not handed on to one of its benchmarks."""
    if own.full != given.full:
        words = [word for word in words if word != "--full"]
    if own.budget != given.budget:
        words = _without(words, "--budget")
    if own.seeds != given.seeds:
        words = [*_without(words, "--seeds"), "--seeds", ",".join(map(str, own.seeds))]
    return words


def _list(console: Console) -> None:
    table = RichTable("name", "question")
    for name in sorted(REGISTRY):
        table.add_row(name, REGISTRY[name].question)
    Console(width=console.width).print(table)
