"""Running a benchmark: cells that fail alone, progress, resuming, and the results folder.

While a run is under way its finished cells are in ``cells.jsonl``, one a line. At the end they go into
``result.json``, with provenance and claims; ``table.md`` and the plots are made from them.
"""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from .bench import BenchError, Benchmark, Cell, Settings, Table
from .provenance import provenance

__all__ = ["load", "run", "to_markdown"]

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
            and ``only`` may ask for more than they did); its finished cells stay.
        command: recorded as given.
        console: where progress and tables go.

    Returns:
        The folder.

    Raises:
        BenchError: the settings cannot be run, or are not those of the run to be resumed.
    """
    console = console or Console(stderr=True)
    if settings.full and (settings.quick or not benchmark.scales):
        why = "--quick" if settings.quick else f"the benchmark {benchmark.name!r}, which has one scale"
        raise BenchError(f"--full does not go with {why}: leave it away.")
    if benchmark.cpu_only and settings.device != "cpu":
        raise BenchError(f"{benchmark.name} {benchmark.cpu_only}: leave --device away.")
    _check_device(settings)
    benchmark.check(settings)
    cells = _chosen(benchmark.cells(settings), settings)
    folder = resume or out or _dated(benchmark, settings)
    done = _finished(folder, benchmark, settings) if resume else {}
    _check_kept(folder, done, cells)
    if not resume and (folder / "result.json").exists():
        raise BenchError(f"{folder} already holds a result. Choose another --out, or --resume {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    origin = provenance(settings, command)  # now: the code that runs is the one that is there now
    journal = folder / "cells.jsonl"
    with _frozen(), journal.open("w", encoding="utf-8") as lines:
        head = {"benchmark": benchmark.name, "settings": settings.as_json()}
        lines.write(json.dumps(head) + "\n")
        for record in done.values():
            lines.write(json.dumps(record) + "\n")
        lines.flush()
        for record in _run_cells(benchmark, cells, done, settings, console):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            done[record["key"]] = record
    records = [done[cell.key] for cell in cells]
    _write(folder, benchmark, records, origin, console)
    journal.unlink()
    return folder


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
    benchmark: Benchmark, cells: list[Cell], done: dict[str, Any], settings: Settings, console: Console
) -> Any:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(benchmark.name, total=len(cells), completed=len(done))
        for cell in cells:
            if cell.key in done:
                continue
            progress.update(task, description=f"{benchmark.name}: {cell.key}")
            begin = time.perf_counter()
            record = {"key": cell.key, "options": cell.options, "status": "ok", "reason": "", "data": None}
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
            yield rounded(record)


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


def _check_device(settings: Settings) -> None:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "No CUDA device is present: nothing was measured. Use --device cpu (the benchmark 'gpu': with "
            "--quick)."
        )


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


def _finished(folder: Path, benchmark: Benchmark, settings: Settings) -> dict[str, Any]:
    """The cells of an earlier run that did not fail, by key."""
    if (folder / "cells.jsonl").exists():
        text = (folder / "cells.jsonl").read_text(encoding="utf-8")
        # The last line may have been cut off when the run was interrupted.
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            return {}
        head, records = lines[0], lines[1:]
    elif (folder / "result.json").exists():
        result = load(folder)
        head = {"benchmark": result["benchmark"], "settings": result["provenance"]["settings"]}
        records = result["cells"]
    else:
        raise BenchError(f"Nothing to resume in {folder}: it holds neither cells.jsonl nor result.json.")
    if head["benchmark"] != benchmark.name:
        raise BenchError(f"{folder} holds a run of {head['benchmark']!r}, not of {benchmark.name!r}.")
    for name in _MUST_MATCH:
        mine, theirs = settings.as_json()[name], head["settings"].get(name, False)
        if mine != theirs:
            raise BenchError(f"{folder} was run with --{name} {theirs!r}, not {mine!r}: start afresh.")
    return {record["key"]: record for record in records if record["status"] == "ok"}


def load(folder: Path) -> dict[str, Any]:
    """The ``result.json`` of a folder."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _check_kept(folder: Path, done: dict[str, Any], cells: list[Cell]) -> None:
    """Every finished cell must be one of the cells asked for, made with the same options."""
    asked = {cell.key: json.loads(json.dumps(cell.options)) for cell in cells}
    lost = [key for key, record in done.items() if asked.get(key) != record["options"]]
    if lost:
        raise BenchError(
            f"{folder} holds {len(lost)} finished cell(s) that this run would not keep, such as {lost[0]}: "
            "ask for all of its --seeds and --only, and more, or start afresh."
        )


def _write(
    folder: Path,
    benchmark: Benchmark,
    records: list[dict[str, Any]],
    origin: dict[str, Any],
    console: Console,
) -> None:
    tables = benchmark.tables(records)
    result = {
        "benchmark": benchmark.name,
        "question": benchmark.question,
        "provenance": origin,
        "claims": [asdict(claim) for claim in benchmark.claims(records)],
        "cells": records,
    }
    (folder / "result.json").write_text(_lines(result), encoding="utf-8")
    (folder / "table.md").write_text(_page(benchmark, origin, tables, records), encoding="utf-8")
    plots = benchmark.plots(records, folder)
    for table in tables:
        if table.long:
            continue
        console.print(_rich(table))
        for note in table.notes:
            console.print(note, style="dim", markup=False, highlight=False)
    console.print(f"{folder}: result.json, table.md" + "".join(f", {plot.name}" for plot in plots))


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


def _page(benchmark: Benchmark, origin: dict[str, Any], tables: list[Table], records: list[Any]) -> str:
    where = origin["gpu"] or f"{origin['cpu']}, {origin['threads']} thread(s)"
    code = origin["commit"][:12] + (" with local changes" if origin["dirty"] else "")
    parts = [
        f"# {benchmark.name}",
        benchmark.question,
        f"`{origin['command']}`",
        f"{origin['date']}; commit {code}; {where}; torch {origin['torch']}, torchdeq {origin['torchdeq']}, "
        f"timm {origin['timm']}, Python {origin['python']}; seeds {origin['settings']['seeds']}.",
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
