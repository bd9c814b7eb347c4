"""``gpu``: the set for one GPU, float32 and bfloat16 autocast, within eight minutes on an H200-class one.

The cells are those of ``solvers`` and ``backward``. Nothing is fetched from the network; the results are five
small files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .backward import QUICK_DEPTHS, Backward
from .harness import BenchError, Benchmark, Cell, Claim, Settings, Table, find, register
from .solvers import PRECISIONS, QUICK, Solvers

__all__ = ["Gpu"]

PROBLEMS = ("easy", "c", "a_hard", "b", "c_conv")
DEPTHS = {"a_hard": (5, 50, 200), "conv_slow": (5, 50, 200)}
BUDGET = 0.5  # of the seconds that a cell may take on a CPU


class Gpu(Benchmark):
    """The headline problems and gradients on a GPU, in both precisions."""

    name = "gpu"
    question = "The same on a GPU, in float32 and under bfloat16 autocast?"

    def check(self, settings: Settings) -> None:
        if settings.device != "cuda":
            raise BenchError("The benchmark 'gpu' runs on CUDA: leave --device away or say --device cuda.")

    def cells(self, settings: Settings) -> list[Cell]:
        problems = tuple(QUICK) if settings.quick else PROBLEMS
        depths = QUICK_DEPTHS if settings.quick else DEPTHS
        return [
            *(c for p in PRECISIONS for c in Solvers.problem_cells(problems, settings, p)),
            *(c for c in find("solvers").cells(settings) if c.options["kind"] == "overhead"),
            *(c for p in PRECISIONS for c in Backward.depth_cells(depths, settings, p)),
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        owner = find("backward" if cell.options["kind"] == "depth" else "solvers")
        shorter = Settings(
            settings.device, settings.quick, settings.seeds, settings.threads, (), BUDGET * settings.budget
        )
        return owner.run_cell(cell, shorter)

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [*find("solvers").tables(cells), *find("backward").tables(cells)]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [*find("solvers").plots(cells, folder), *find("backward").plots(cells, folder)]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return [*find("solvers").claims(cells), *find("backward").claims(cells)]


register(Gpu())
