"""``backward``: what a gradient costs and how right it is, as the forward pass gets deeper.

For each solver the implicit gradient (with each of its linear solvers) against unrolled, checkpointed,
phantom and one-step gradients, and against torchdeq's implicit gradient, phantom gradients of 1 and 5 steps,
and one through nearly all iterations. How a cell is measured is in :mod:`benchmarks.solving.depth`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import Benchmark, Cell, Claim, Settings, Table, register
from .solvers import bench_of
from .solving import depth_report
from .solving.depth import differentiate
from .solving.measure import Bench

__all__ = ["Backward"]

DEPTHS = {"a_hard": (5, 10, 20, 50, 100, 200), "conv_slow": (5, 20, 50, 100, 200)}
BATCH = {"a_hard": 64, "conv_slow": 8}
QUICK_DEPTHS = {"a_hard": (5, 20), "conv_slow": (5,)}
QUICK_BATCH = {"a_hard": 8, "conv_slow": 2}


class Backward(Benchmark):
    """Time, memory and error of gradients against depth."""

    name = "backward"
    question = "What does a gradient cost in time and memory, and how right is it, as the solve gets deeper?"

    def __init__(self) -> None:
        self._benches: dict[tuple[Any, ...], Bench] = {}

    def cells(self, settings: Settings) -> list[Cell]:
        return self.depth_cells(QUICK_DEPTHS if settings.quick else DEPTHS, settings, "float32")

    @staticmethod
    def depth_cells(depths: dict[str, tuple[int, ...]], settings: Settings, precision: str) -> list[Cell]:
        """One cell for each problem, depth and seed."""
        short = "" if precision == "float32" else "/bf16"
        return [
            Cell(
                f"{problem}/depth{depth}{short}/seed{seed}",
                {"kind": "depth", "problem": problem, "depth": depth, "seed": seed, "precision": precision},
            )
            for seed in settings.seeds
            for problem, many in depths.items()
            for depth in many
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        problem, seed = cell.options["problem"], cell.options["seed"]
        batch = (QUICK_BATCH if settings.quick else BATCH)[problem]
        key = (problem, seed, settings.device, cell.options["precision"], batch)
        if key not in self._benches:  # the depths of a problem share its reference
            self._benches = {key: bench_of(*key)}
        records = differentiate(
            self._benches[key],
            cell.options["depth"],
            quick=settings.quick,
            budget_s=(0.3 if settings.quick else 5.0) * settings.budget,
            max_rounds=3 if settings.quick else 20,
            seed=seed,
        )
        return {"batch": batch, "ways": records}

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [depth_report.implicit_table(cells), depth_report.full_table(cells)]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [depth_report.plot(cells, folder / "depth.png")]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return depth_report.claims(cells)


register(Backward())
