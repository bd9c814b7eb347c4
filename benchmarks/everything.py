"""``python -m benchmarks all``: every benchmark, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .harness import REGISTRY, BenchError, Benchmark, Interrupted, Settings, run
from .harness.journal import JOURNAL, RESULT, load, require_place
from .harness.run import reason_of, require_resumable

__all__ = ["ALL", "own_settings", "run_all"]

ALL = "all"
_APART = ("gpu",)  # the same questions over again, within the time that a GPU is lent for


def own_settings(benchmark: Benchmark, settings: Settings) -> Settings:
    """The settings for all without those that this benchmark has no use for, and would refuse."""
    return replace(
        settings,
        full=settings.full and benchmark.scales,
        seeds=settings.seeds[:1] if benchmark.one_seed else settings.seeds,
        budget=1.0 if benchmark.no_budget else settings.budget,
    )


def run_all(
    settings: Settings,
    out: Path | None,
    command: Callable[[str], str],
    console: Console,
    resume: Path | None = None,
) -> int:
    """Run every benchmark but ``gpu``, each into a folder of its own.

    One that fails does not lose the others.

    Args:
        settings: of each of them; ``full``, ``seeds`` beyond the first and ``budget`` are left to those that
            have a use for them.
        out: holds the folders, called as the benchmarks; None: dated ones in ``benchmarks/results``.
        command: from a benchmark's name to what is recorded as its command.
        console: where progress and tables go.
        resume: what ``out`` was for a run of all that was interrupted or has failed cells: those that have a
            folder there go on in it, the others begin one.

    Returns:
        How many failed, or have failed cells.

    Raises:
        BenchError: the settings are not for all of them, or not those of the run to be resumed.
        Interrupted: on Ctrl-C.
    """
    _check(settings, out, resume)
    names = [name for name in sorted(REGISTRY) if name not in _APART]
    if out is not None:
        _require_free(out, names)
    begun = [] if resume is None else _begun(names, resume, settings)
    place = resume or out
    table = Table("benchmark", "seconds", "cells", "failed", "what went wrong")
    failed = 0
    for number, name in enumerate(names):
        begin = time.perf_counter()
        benchmark = REGISTRY[name]
        own = own_settings(benchmark, settings)
        mine, again = place and place / name, name in begun
        try:
            folder = run(
                benchmark,
                own,
                out=None if again else mine,
                resume=mine if again else None,
                command=command(name),
                console=console,
            )
            cells = load(folder)["cells"]
            wrong = [f"{cell['key']}: {cell['reason']}" for cell in cells if cell["status"] != "ok"]
            row = (str(len(cells)), str(len(wrong)), "; ".join(wrong))
        except Interrupted as stop:
            raise Interrupted(_way_on(stop, place, names[number:])) from None
        except Exception as error:
            wrong = [reason_of(error)]
            row = ("-", "-", wrong[0])
        failed += bool(wrong)
        table.add_row(name, f"{time.perf_counter() - begin:.0f}", *row)
    console.print(table)
    return failed


def _check(settings: Settings, out: Path | None, resume: Path | None) -> None:
    """Raise where the settings are not for all benchmarks."""
    if settings.only:
        raise BenchError("--only chooses among the cells of one benchmark: say which, in place of 'all'.")
    if settings.device != "cpu":
        raise BenchError("'all' runs on the CPU. For a GPU there is 'gpu', in one run.")
    if settings.quick and settings.full:
        raise BenchError("--full does not go with --quick: leave one of them away.")
    if settings.quick and out is None and resume is None:
        raise BenchError("A --quick run is no evidence and does not go into results/: say --out FOLDER.")


def _require_free(out: Path, names: list[str]) -> None:
    """Raise where the folder holds a run of one of them already."""
    for file, words in ((RESULT, "a result"), (JOURNAL, "an interrupted run")):
        taken = [name for name in names if (out / name / file).exists()]
        if taken:
            raise BenchError(f"{out} already holds {words} of {', '.join(taken)}. Choose another --out.")
    require_place(out)


def _begun(names: list[str], folder: Path, settings: Settings) -> list[str]:
    """Those that an earlier run of all has begun in a folder; all of them can go on as they were begun."""
    begun = [name for name in names if any((folder / name / file).exists() for file in (RESULT, JOURNAL))]
    if not begun:
        raise BenchError(
            f"Nothing to resume in {folder}: no benchmark has a folder there. Say what --out was for 'all'; "
            "a run of one benchmark goes on with its name in place of 'all'."
        )
    for name in begun:
        require_resumable(folder / name, REGISTRY[name], own_settings(REGISTRY[name], settings))
    return begun


def _way_on(stop: Interrupted, place: Path | None, left: list[str]) -> str:
    """How to go on where all were stopped: dated folders know nothing of each other."""
    if place is not None:
        return f"go on with 'all', --resume {place} and the same other options"
    later = f"; not begun: {', '.join(left[1:])}" if left[1:] else ""
    return f"{stop}, with {left[0]!r} in place of 'all'{later}"
