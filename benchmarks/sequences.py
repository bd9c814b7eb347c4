"""``sequences``: the first paper's sine wave, and long-range tasks against GRU and LSTM of equal size.

The sine task and what the paper leaves open are in :mod:`benchmarks.sequencing.sine`; the tasks in
:mod:`benchmarks.sequencing.tasks`, the contestants in :mod:`benchmarks.sequencing.models`, and how they are
trained, to the same number of multiply-adds, in :mod:`benchmarks.sequencing.train`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .sequencing import report
from .sequencing.models import CONTESTANTS
from .sequencing.pictures import curves, figure7
from .sequencing.sine import ADJOINTS, RATES, train_wave
from .sequencing.tasks import make_task
from .sequencing.train import RATES as GRID
from .sequencing.train import Recipe, contest

__all__ = ["Sequences"]

GRU, LSTM, THROUGH, LAG, END, WITHIN = (
    "GRU",
    "LSTM",
    "GRU, wormhole through time",
    "GRU, wormhole of the copy's lag",
    "GRU, wormhole from the end",
    "GRU, wormhole within the step",
)
LONG: tuple[tuple[str, int, Recipe, tuple[str, ...]], ...] = (
    ("adding", 100, Recipe(updates=500), (GRU, LSTM, THROUGH, END, WITHIN)),
    ("digits", 64, Recipe(updates=600, held=180), (GRU, LSTM, THROUGH, END, WITHIN)),
    ("copy", 100, Recipe(updates=500, batch=32), (GRU, LSTM, THROUGH, LAG)),
    ("copy", 1000, Recipe(updates=300, batch=16, held=64), (GRU, LSTM, THROUGH, LAG)),
    ("adding", 1000, Recipe(updates=150, batch=32, held=256), (GRU, LSTM, THROUGH)),
)
QUICK = (
    ("adding", 20, Recipe(hidden=12, updates=6, batch=8, held=16, looks=3), (GRU, THROUGH, END)),
    ("copy", 5, Recipe(hidden=12, updates=6, batch=8, held=16, looks=3), (GRU, THROUGH)),
)
SAMPLES, UPDATES = 10_000, 300


class Sequences(Benchmark):
    """Sine wave, adding problem, copy memory, images read as sequences."""

    name = "sequences"
    question = (
        "Does a wormhole through time help recurrent networks remember, at equal size and training compute?"
    )

    def cells(self, settings: Settings) -> list[Cell]:
        found = [
            Cell(
                f"sine/{adjoint}/seed{seed}",
                {"kind": "sine", "adjoint": adjoint, "seed": seed, RECIPE: fingerprint(_wave(settings))},
            )
            for seed in settings.seeds
            for adjoint in ADJOINTS
        ]
        found += [
            Cell(
                f"{task}/{length}/{name.replace(', ', '+').replace(' ', '_')}/seed{seed}",
                {
                    "kind": "contest",
                    "task": task,
                    "length": length,
                    "name": name,
                    "seed": seed,
                    RECIPE: fingerprint(_recipe(task, length, settings), _rates(settings)),
                },
            )
            for task, length, _, names in (QUICK if settings.quick else LONG)
            for seed in settings.seeds
            for name in names
        ]
        return found

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        options, seed = cell.options, cell.options["seed"]
        if options["kind"] == "sine":
            samples, updates, rates = _wave(settings)
            return {
                "runs": {
                    f"{rate:g}": train_wave(options["adjoint"], rate, seed, samples, updates, settings.device)
                    for rate in rates
                }
            }
        recipe = _recipe(options["task"], options["length"], settings)
        task = make_task(options["task"], options["length"], seed, recipe.held)
        return contest(options["name"], task, recipe, seed, _rates(settings), settings.device)

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        tables = [report.sine_table(cells), report.contest_table(cells)]
        return [table for table in tables if table.rows]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        drawn = [figure7(cells, folder / "figure7.png"), curves(cells, folder / "long_range.png")]
        return [path for path in drawn if path is not None]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return report.claims(cells)


def _wave(settings: Settings) -> tuple[int, int, tuple[float, ...]]:
    """Samples, updates and learning rates of the sine wave."""
    if settings.quick:
        return 1000, 12, RATES[-1:]
    return SAMPLES, max(1, min(300, round(UPDATES * settings.budget))), RATES


def _recipe(task: str, length: int, settings: Settings) -> Recipe:
    """How the contestants of a task are trained."""
    grid = QUICK if settings.quick else LONG
    recipe = next(r for t, n, r, _ in grid if (t, n) == (task, length))
    return replace(recipe, updates=max(1, round(recipe.updates * settings.budget)))


def _rates(settings: Settings) -> tuple[float, ...]:
    """Learning rates that a contestant tries."""
    return GRID[-2:] if settings.quick else GRID


assert {name for _, _, _, names in LONG for name in names} <= CONTESTANTS.keys()

register(Sequences())
