"""Running a benchmark: cells that fail alone, progress, resuming, and the results folder.

While a run is under way its finished cells are in ``cells.jsonl``, one a line
(:mod:`benchmarks.harness.journal`). At the end they go into ``result.json``, with provenance and claims;
``table.md`` and the plots are made from them.
"""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from .bench import RECIPE, BenchError, Benchmark, Cell, Interrupted, PageError, Settings, Table
from .journal import RESULT, begin_journal, earlier, load, require_place, require_unused
from .provenance import code_of, dates_of, provenance, stamp, versions_of, where_of

__all__ = ["load", "page_of", "require_resumable", "run", "to_markdown"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_MUST_MATCH = ("device", "quick", "threads", "budget", "full")


def run(
    benchmark: Benchmark,
    settings: Settings,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    command: str = "",
    console: Console | None = None,
) -> Path:
    """Run the cells that are not done yet and write the results.

    Args:
        benchmark: what to run.
        settings: how.
        out: folder for the results; None: a dated one in ``benchmarks/results``.
        resume: folder of a run that was interrupted, has failed cells, or is to get more of them (``seeds``
            and ``only`` may ask for more than they did); its finished cells stay, and stay those of the
            commit that measured them. Those that another recipe trained are measured again.
        command: recorded as given.
        console: where progress and tables go.

    Returns:
        The folder.

    Raises:
        BenchError: the settings cannot be run, or are not those of the run to be resumed; the folder is
            taken, cannot be written to, or holds damaged files.
        Interrupted: on Ctrl-C; the finished cells are in the folder.
        PageError: ``result.json`` is there, with all cells; some of what is made of them is not.
    """
    console = console or Console(stderr=True)
    _check(benchmark, settings)
    cells = _chosen(benchmark.cells(settings), settings)
    folder = resume or out or _dated(benchmark, settings)
    require_place(folder)
    if resume is None:
        require_unused(folder)
    done = _finished(folder, benchmark, settings, cells, console) if resume else {}
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":  # float32 is to be float32, for everybody alike
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    origin = provenance(settings, command)  # now: the code that runs is the one that is there now
    head = {"benchmark": benchmark.name, "settings": settings.as_json(), "provenance": origin}
    journal = begin_journal(folder, head, done.values())
    try:
        with _frozen(), journal.open("a", encoding="utf-8") as lines:
            for record in _run_cells(benchmark, cells, done, settings, origin, console):
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                done[record["key"]] = record
        lacking = _write(folder, benchmark, [done[cell.key] for cell in cells], origin, console)
        journal.unlink()
    except KeyboardInterrupt:
        raise Interrupted(f"go on with --resume {folder} and the same other options") from None
    if lacking:
        raise PageError(
            f"Not made: {'; '.join(lacking)}. All cells are in {folder / RESULT}: once that is mended, "
            f"--resume {folder} makes it of them."
        )
    return folder


def require_resumable(folder: Path, benchmark: Benchmark, settings: Settings) -> None:
    """:class:`BenchError` where a run with these settings cannot go on in the folder; measures nothing."""
    cells = _chosen(benchmark.cells(settings), settings)
    _finished(folder, benchmark, settings, cells, Console(quiet=True))


@contextmanager
def _frozen() -> Iterator[None]:
    """What the imports made is not looked through by the garbage collector before every round of timing."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # bindings complain at exit of what was never collected


def _run_cells(
    benchmark: Benchmark,
    cells: list[Cell],
    done: dict[str, Any],
    settings: Settings,
    origin: dict[str, Any],
    console: Console,
) -> Iterator[dict[str, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(benchmark.name, total=len(cells), completed=len(done))
        for cell in cells:
            if cell.key in done:
                continue
            progress.update(task, description=f"{benchmark.name}: {cell.key}")
            begin = time.perf_counter()
            record = {"key": cell.key, "options": cell.options, "status": "ok", "reason": "", "data": None}
            made = stamp(origin)
            try:
                with warnings.catch_warnings():
                    # Failed rows are counted from the measured residual; their warnings would bury the table.
                    warnings.simplefilter("ignore")
                    record["data"] = benchmark.run_cell(cell, settings)
            except Exception as error:
                record.update(status="failed", reason=reason_of(error))
                console.print(f"[red]{cell.key} failed[/red]: {record['reason']}", highlight=False)
                console.print(traceback.format_exc(), style="dim", markup=False, highlight=False)
            record["wall_s"] = round(time.perf_counter() - begin, 2)
            progress.advance(task)
            yield {**rounded(record), "origin": made}


def rounded(value: Any) -> Any:
    """JSON values with floats of six significant digits: more are noise, and fill the files."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def reason_of(error: BaseException) -> str:
    """An error in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


def _check(benchmark: Benchmark, settings: Settings) -> None:
    """Refuse what this benchmark, or this machine, would not do as it was told."""
    if settings.full and (settings.quick or not benchmark.scales):
        why = "--quick" if settings.quick else f"the benchmark {benchmark.name!r}, which has one scale"
        raise BenchError(f"--full does not go with {why}: leave it away.")
    if benchmark.cpu_only and settings.device != "cpu":
        raise BenchError(f"{benchmark.name} {benchmark.cpu_only}: leave --device away.")
    if benchmark.one_seed and len(settings.seeds) > 1:
        raise BenchError(
            f"{benchmark.name} {benchmark.one_seed}: say one seed with --seeds, not {len(settings.seeds)}."
        )
    if benchmark.no_budget and settings.budget != 1.0:
        raise BenchError(f"{benchmark.name} {benchmark.no_budget}: leave --budget away.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "No CUDA device is present: nothing was measured. Use --device cpu (the benchmark 'gpu': with "
            "--quick)."
        )
    benchmark.check(settings)


def _chosen(cells: list[Cell], settings: Settings) -> list[Cell]:
    keys = [cell.key for cell in cells]
    for part in settings.only:
        if not any(part in key for key in keys):
            raise BenchError(f"--only {part} fits no cell. Cells: {', '.join(keys)}.")
    return [c for c in cells if not settings.only or any(part in c.key for part in settings.only)]


def _dated(benchmark: Benchmark, settings: Settings) -> Path:
    if settings.quick:
        raise BenchError("A --quick run is no evidence and does not go into results/: say --out FOLDER.")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    device = "" if benchmark.name == "gpu" else f"_{settings.device}"
    return RESULTS / f"{today}_{benchmark.name}{device}"


def _finished(
    folder: Path, benchmark: Benchmark, settings: Settings, cells: list[Cell], console: Console
) -> dict[str, Any]:
    """The cells of an earlier run that need not be measured again, by key."""

    def say(words: str) -> None:
        console.print(words, style="yellow", markup=False, highlight=False)

    found = earlier(folder, say)
    if found is None:
        return {}
    if found.benchmark != benchmark.name:
        raise BenchError(f"{folder} holds a run of {found.benchmark!r}, not of {benchmark.name!r}.")
    mine = settings.as_json()
    for name in (*_MUST_MATCH, *(("seeds",) if benchmark.one_seed else ())):
        theirs = found.settings.get(name, False)
        if mine[name] != theirs:
            raise BenchError(f"{folder} was run with --{name} {theirs!r}, not {mine[name]!r}: start afresh.")
    done = {cell["key"]: cell for cell in found.cells if cell["status"] == "ok"}
    asked = {cell.key: json.loads(json.dumps(cell.options)) for cell in cells}
    _check_kept(folder, done, asked)
    other = [key for key, cell in done.items() if asked[key].get(RECIPE) != cell["options"].get(RECIPE)]
    if other:
        say(
            f"{folder}: {len(other)} finished cell(s) were trained by another recipe, or do not say by "
            f"which: measured again. They are {', '.join(other)}."
        )
    kept = {key: cell for key, cell in done.items() if key not in other}
    _check_data(found.file, benchmark, kept)
    return kept


def _check_kept(folder: Path, done: dict[str, Any], asked: dict[str, dict[str, Any]]) -> None:
    """Every finished cell must be one of the cells asked for, with the same options but for its recipe."""

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return {**one, RECIPE: None} == {**other, RECIPE: None}

    lost = [key for key, cell in done.items() if key not in asked or not same(asked[key], cell["options"])]
    if lost:
        raise BenchError(
            f"{folder} holds {len(lost)} finished cell(s) that this run would not keep, such as {lost[0]}: "
            "ask for all of its --seeds and --only, and more, or start afresh."
        )


def _check_data(file: Path, benchmark: Benchmark, kept: dict[str, Any]) -> None:
    """The data of finished cells must be such as can be read; better said now than when others have run."""
    for key, cell in kept.items():
        try:
            benchmark.tables([cell])
            benchmark.claims([cell])
        except Exception as error:
            raise BenchError(
                f"{file} is damaged, or of another version: the data of its cell {key} cannot be read "
                f"({reason_of(error)}). Without that cell, --resume measures it again."
            ) from None


def _write(
    folder: Path,
    benchmark: Benchmark,
    records: list[dict[str, Any]],
    origin: dict[str, Any],
    console: Console,
) -> list[str]:
    """The result, and the pages made of it; what could not be made, and why."""
    lacking: list[str] = []

    def made(what: str, make: Callable[[], list[Any]]) -> list[Any]:
        # A mistake in what is said of the cells must not lose them.
        try:
            return make()
        except Exception as error:
            lacking.append(f"{what} ({reason_of(error)})")
            console.print(traceback.format_exc(), style="dim", markup=False, highlight=False)
            return []

    tables = made("tables", lambda: benchmark.tables(records))
    result = {
        "benchmark": benchmark.name,
        "question": benchmark.question,
        "provenance": origin,
        "claims": made("claims", lambda: [asdict(claim) for claim in benchmark.claims(records)]),
        "cells": records,
    }
    aside = folder / f"{RESULT}.new"  # the result of an earlier run stays until this one is whole
    aside.write_text(_lines(result), encoding="utf-8")
    aside.replace(folder / RESULT)
    (folder / "table.md").write_text(page_of(benchmark, origin, tables, records), encoding="utf-8")
    plots = made("plots", lambda: benchmark.plots(records, folder))
    for table in tables:
        if table.long:
            continue
        console.print(_rich(table))
        for note in table.notes:
            console.print(note, style="dim", markup=False, highlight=False)
    console.print(f"{folder}: result.json, table.md" + "".join(f", {plot.name}" for plot in plots))
    return lacking


def _lines(result: dict[str, Any]) -> str:
    """JSON with a line for each cell and claim: small, and still readable in a diff."""
    short: dict[str, Any] = {"separators": (",", ":")}
    parts = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(item, **short) for item in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def page_of(benchmark: Benchmark, origin: dict[str, Any], tables: list[Table], records: list[Any]) -> str:
    """``table.md``: where the figures come from, and all tables."""
    versions = versions_of(origin, records, "torch", "torchdeq", "timm", "Python")
    parts = [
        f"# {benchmark.name}",
        benchmark.question,
        f"`{origin['command']}`",
        f"{dates_of(origin, records)}; {code_of(origin, records)}; {where_of(origin, records)}; {versions}; "
        f"seeds {origin['settings']['seeds']}.",
    ]
    if origin["settings"]["quick"]:
        parts.append("A quick run: it shows that everything works; its figures are noise.")
    parts += [to_markdown(table) for table in tables]
    failed = [f"- {record['key']}: {record['reason']}" for record in records if record["status"] != "ok"]
    if failed:
        parts.append("## Failed cells\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def to_markdown(table: Table) -> str:
    """A table as Markdown, with its title and notes."""
    lines = [
        f"## {table.title}",
        "",
        "| " + " | ".join(table.columns) + " |",
        "|---" * len(table.columns) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines)


def _rich(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        made.add_column(column, justify="left" if index < 2 else "right")
    for row in table.rows:
        made.add_row(*map(Text, row))  # as text: brackets are no markup here
    return made
