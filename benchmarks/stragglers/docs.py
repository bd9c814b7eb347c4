"""Put the figures into the page: ``python -m benchmarks.stragglers.docs docs/scaling.md RESULT.json``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness.bench import Table
from ..harness.provenance import code_of, days_of, versions_of
from ..harness.run import to_markdown
from . import pages

__all__ = ["insert"]

BEGIN = "<!-- scaling: python -m benchmarks.stragglers.docs docs/scaling.md RESULT.json -->\n"
END = "<!-- scaling end -->\n"


def insert(page: str, result: dict[str, Any]) -> str:
    """The page with the tables of a result between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The page has no place for the figures: {BEGIN.strip()} ... {END.strip()}")
    origin, cells = result["provenance"], result["cells"]
    seeds = ", ".join(map(str, origin["settings"]["seeds"]))
    told = (
        f"`{origin['command']}` on {days_of(origin, cells)}, {code_of(origin, cells)}, "
        f"{versions_of(origin, cells, 'torch')}, seeds {seeds}."
    )
    tables = (pages.recorded(cells), pages.lost(cells), pages.remedies(cells), pages.capped(cells))
    return f"{before}{begin}{told}\n\n" + "\n\n".join(map(_deeper, tables)) + f"\n{end}{after}"


def _deeper(table: Table) -> str:
    return "#" + to_markdown(replace(table, long=False))


if __name__ == "__main__":
    page, figures = map(Path, sys.argv[1:])
    text = insert(page.read_text(encoding="utf-8"), json.loads(figures.read_text(encoding="utf-8")))
    page.write_text(text, encoding="utf-8")
