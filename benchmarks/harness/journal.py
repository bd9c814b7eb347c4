"""Reading what a run has left: ``cells.jsonl`` while it is under way, ``result.json`` when it has ended.

The journal has a line for its head (benchmark, settings, provenance) and one for each cell that has ended. It
is never written over: a run that goes on writes its own aside and then puts it in the place of the old one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .bench import BenchError
from .provenance import inherited

__all__ = [
    "JOURNAL",
    "RESULT",
    "Earlier",
    "begin_journal",
    "earlier",
    "load",
    "require_place",
    "require_unused",
]

JOURNAL, RESULT = "cells.jsonl", "result.json"


class Earlier(NamedTuple):
    """What an earlier run says of itself, and its cells, each with its ``origin`` (None: unknown)."""

    file: Path
    benchmark: str
    settings: dict[str, Any]
    cells: list[dict[str, Any]]


def require_place(folder: Path) -> None:
    """Make the folder; :class:`BenchError` where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise BenchError(f"{folder} cannot hold results ({why}): nothing was measured.") from None


def require_unused(folder: Path) -> None:
    """:class:`BenchError` where a new run would write over what an earlier one has left."""
    if (folder / JOURNAL).exists():
        raise BenchError(
            f"{folder} holds the finished cells of an interrupted run. Go on with --resume {folder}, or "
            "choose another folder with --out."
        )
    if (folder / RESULT).exists():
        raise BenchError(f"{folder} already holds a result. Choose another --out, or --resume {folder}.")


def begin_journal(folder: Path, head: dict[str, Any], cells: Iterable[dict[str, Any]]) -> Path:
    """Write a journal that holds these cells; its path, to be appended to.

    Until the new one is whole on the disk, the old one stays: a crash loses neither.
    """
    aside = folder / f"{JOURNAL}.new"
    with aside.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(part) + "\n" for part in (head, *cells))
        lines.flush()
        os.fsync(lines.fileno())
    return aside.replace(folder / JOURNAL)


def earlier(folder: Path, say: Callable[[str], None]) -> Earlier | None:
    """What is in a folder that a run is to go on in.

    Args:
        folder: of the earlier run.
        say: told of what had to be left out.

    Returns:
        None if the run was interrupted before it had noted anything.

    Raises:
        BenchError: there is nothing, or it cannot be read.
    """
    if (folder / JOURNAL).exists():
        parts = _lines_of(folder / JOURNAL, say)
        if not parts:
            return None
        head, cells = parts[0], parts[1:]
        benchmark, settings, run = head.get("benchmark"), head.get("settings"), head.get("provenance")
        found = folder / JOURNAL
    elif (folder / RESULT).exists():
        found = folder / RESULT
        result = load(folder)
        benchmark, cells, run = result["benchmark"], result["cells"], result["provenance"]
        settings = run.get("settings")
    else:
        raise BenchError(f"Nothing to resume in {folder}: it holds neither {JOURNAL} nor {RESULT}.")
    if not (isinstance(benchmark, str) and isinstance(settings, dict)):
        raise BenchError(f"{found} is damaged: it does not say of which benchmark and settings it is.")
    for number, cell in enumerate(cells, start=1):
        if not _is_cell(cell):
            raise BenchError(f"{found} is damaged: its cell {number} is none.{_way_out(folder)}")
    origin = inherited(run if isinstance(run, dict) else None)
    cells = [{**cell, "origin": cell.get("origin", origin)} for cell in cells]
    return Earlier(found, benchmark, settings, cells)


def load(folder: Path) -> dict[str, Any]:
    """The ``result.json`` of a folder; :class:`BenchError` if it is damaged."""
    file = folder / RESULT
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise BenchError(f"{file} is damaged: {error}.") from None
    parts = {"benchmark": str, "question": str, "provenance": dict, "claims": list, "cells": list}
    wrong = [
        n for n, kind in parts.items() if not isinstance(result, dict) or not isinstance(result.get(n), kind)
    ]
    if wrong:
        raise BenchError(f"{file} is damaged: it lacks {', '.join(wrong)}.")
    return result


def _lines_of(file: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that was cut off as the run was interrupted is left out."""
    parts: list[dict[str, Any]] = []
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            part = json.loads(line)
            whole = isinstance(part, dict) and line.endswith(b"\n")
        except ValueError:
            whole = False
        if whole:
            parts.append(part)
        elif number < len(lines):
            raise BenchError(f"{file} is damaged: line {number} cannot be read.{_way_out(file.parent)}")
        else:
            say(f"{file}: the last line was cut off and is left out; its cell is measured again.")
    return parts


def _is_cell(cell: Any) -> bool:
    """Whether all is there that tables and resuming read."""
    kinds = {"key": str, "options": dict, "status": str, "reason": str}
    return (
        isinstance(cell, dict)
        and all(isinstance(cell.get(n), kind) for n, kind in kinds.items())
        and "data" in cell
    )


def _way_out(folder: Path) -> str:
    if not (folder / JOURNAL).exists():
        return ""
    if (folder / RESULT).exists():
        return f" Without {JOURNAL}, --resume goes on from {RESULT}."
    return " Without that line, --resume measures its cell again."
