"""The demo from end to end."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from twnn_plugin import __version__

from ..data import Batches, DataSplits, load_data
from ..runlog import prepare_folder
from .contest import BUDGET, CONTESTANTS, Entry, compete, summary
from .plots import plot_curve, plot_histogram, plot_images, plot_strings, plot_traces
from .report import Table, contest_table, curve_table, render, solver_table, string_table
from .strings import TRAINED_ON, read_strings
from .swap import TRACE_TOL, difficulty, every_solver, samples, threshold_curve, traces

__all__ = ["run"]

SEEDS = 3
FILES = ("report.md", "metrics.json", "residuals.png", "steps.png", "images.png", "budget.png", "strings.png")


def run(out: Path, seed: int = 0, quick: bool = False, console: Any = None) -> dict[str, Any]:
    """Train, compare, swap solvers, and write the report.

    Args:
        out: folder for ``report.md``, ``metrics.json`` and the plots; made if it is not there.
        seed: of everything random.
        quick: a much shorter training.
        console: a ``rich`` console for tables and progress; silent without one.

    Returns:
        The figures, as in ``metrics.json``.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    out = Path(out)
    prepare_folder(out, "--out")  # a folder that cannot be written to is said before the work
    data = load_data("digits")
    entries: list[list[Entry]] = [[] for _ in CONTESTANTS]
    for each in [seed] if quick else range(seed, seed + SEEDS):
        for runs, contestant in zip(entries, CONTESTANTS, strict=True):
            _say(console, f"seed {each}: training {contestant.title} ({contestant.model})")
            runs.append(compete(contestant, data, each, quick, console))
    figures = _figures(entries, data, out, console)
    _say(console, f"second act: strings of {TRAINED_ON} bits, then longer ones")
    figures["strings"] = read_strings(seed, quick, console)
    plot_strings(figures["strings"], out / "strings.png")
    figures["provenance"] = _provenance(seed, quick)
    _write(out / "report.md", render(figures))
    _write(out / "metrics.json", json.dumps(figures, indent=2) + "\n")
    _show(console, "Three networks, medians", contest_table(figures["contest"], ranges=False))
    _show(console, "The trained wormhole under every solver", solver_table(figures["solvers"]))
    _show(console, "The gate's threshold, moved after training", curve_table(figures["curve"]))
    _show(console, "Trained on 32 bits, read at any length", string_table(figures["strings"]))
    _say(console, f"report and plots: {out / 'report.md'}")
    return figures


def _figures(entries: list[list[Entry]], data: DataSplits, out: Path, console: Any) -> dict[str, Any]:
    test, validation = Batches(data.test, data.spec, 256), Batches(data.val, data.spec, 256)
    wormhole = entries[1][0].model.eval()  # of the first seed: no choice is made
    _say(console, "evaluating the wormhole network under every solver")
    found = samples(wormhole, test)
    lines = traces(wormhole, torch.cat([images for images, _ in test]))
    curve = threshold_curve(wormhole, validation, test)
    solvers = every_solver(wormhole, test)
    opened = found.steps[found.steps > 0]
    plot_traces(lines, 1e-3, TRACE_TOL, out / "residuals.png")
    plot_histogram(found, out / "steps.png")
    plot_images(found, out / "images.png")
    plot_curve(curve, out / "budget.png")
    return {
        "contest": [summary(runs) for runs in entries],
        "budget": BUDGET,
        "difficulty": [
            {"seed": plain.run["seed"], **difficulty(samples(twnn.model.eval(), test), plain.model.eval())}
            for plain, twnn in zip(entries[0], entries[1], strict=True)
        ],
        "steps": {
            "closed": int((found.steps == 0).sum()),
            "fewest": int(opened.min()) if opened.numel() else 0,
            "most": int(opened.max()) if opened.numel() else 0,
            "histogram": torch.bincount(found.steps).tolist(),
        },
        "solvers": solvers,
        "traces": lines,
        "curve": curve,
    }


def _provenance(seed: int, quick: bool) -> dict[str, Any]:
    packages = ("torch", "torchdeq", "timm", "torchvision")
    return {
        "command": "twnn demo" + (" --quick" if quick else "") + (f" --seed {seed}" if seed else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": [seed] if quick else list(range(seed, seed + SEEDS)),
        "quick": quick,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s)",
        "versions": ", ".join(
            [
                f"twnn-plugin {__version__}",
                f"Python {platform.python_version()}",
                *(f"{p} {version(p)}" for p in packages),
            ]
        ),
        "data": "scikit-learn's digits, 1,797 scans of 8x8 pixels",
    }


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _say(console: Any, text: str) -> None:
    if console is not None:
        console.print(text)


def _show(console: Any, title: str, table: Table) -> None:
    if console is None:
        return
    from rich.table import Table as RichTable

    head, rows = table
    shown = RichTable(title=title, title_justify="left")
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
