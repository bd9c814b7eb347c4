"""``memory``: what forward and backward hold as depth, batch and state grow.

For solves of one convolutional cell every adjoint of ours and torchdeq's gradients; for whole models the
wormhole network, torchdeq's equilibrium model and the Hamiltonian network. Nobody reaches the tolerance, so
that everybody makes the same number of iterations. How peaks are measured:
:mod:`benchmarks.harness.memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import Benchmark, Cell, Claim, Settings, Table, peak_bytes, register
from .harness.run import reason_of
from .memories import report
from .memories.ways import MODELS, WAYS, WIDTH, problem_of, run_model, run_way

__all__ = ["Memory"]

AXES: dict[str, tuple[int, ...]] = {
    "depth": (5, 10, 25, 50, 100, 200),
    "batch": (4, 16, 64, 256),
    "side": (4, 8, 16, 32),
    "models": (5, 20, 80),
}
QUICK: dict[str, tuple[int, ...]] = {"depth": (3, 8), "models": (2,)}
QUICK_WAYS = (
    "torchdeq fixed_point_iter / fixed_point_iter",
    "torchdeq phantom(depth)",
    "picard / implicit(picard)",
    "picard / unrolled",
    "picard / checkpointed",
    "TWNN, implicit",
    "TWNN, unrolled",
    "DEQ by torchdeq, implicit",
    "Hamiltonian, reversible",
)
FIXED = {"depth": 25, "batch": 16, "side": 8}
MODEL_BATCH, MODEL_SIDE = 16, 28


class Memory(Benchmark):
    """One cell for each place on an axis, in which all ways are measured."""

    name = "memory"
    question = "How much memory do forward and backward hold as depth, batch and state grow?"
    one_seed = "counts bytes, which do not change with the seed"
    no_budget = "times nothing"

    def cells(self, settings: Settings) -> list[Cell]:
        return self.axis_cells(QUICK if settings.quick else AXES, "float32")

    @staticmethod
    def axis_cells(axes: dict[str, tuple[int, ...]], precision: str) -> list[Cell]:
        """One cell for each place on the axes."""
        short = "" if precision == "float32" else "/bf16"
        return [
            Cell(
                f"{axis}/{value}{short}",
                {"kind": "memory", "axis": axis, "value": value, "precision": precision},
            )
            for axis, values in axes.items()
            for value in values
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        axis, value = cell.options["axis"], cell.options["value"]
        amp = cell.options["precision"] != "float32"
        runs: dict[str, Callable[[], Callable[[], object]]]
        if axis == "models":
            side = 14 if settings.quick else MODEL_SIDE
            fixed = f"Batch of {MODEL_BATCH}, images of {side}x{side}."

            def model_of(name: str) -> Callable[[], Callable[[], object]]:
                return lambda: run_model(name, value, MODEL_BATCH, side, settings.device, amp)

            runs = {name: model_of(name) for name in MODELS}
        else:
            sizes = {**FIXED, axis: value}
            problem = problem_of(sizes["batch"], sizes["side"], settings.device, settings.seeds[0])
            others = ", ".join(f"{name} {size}" for name, size in FIXED.items() if name != axis)
            fixed = f"{WIDTH} channels, {others}."

            def way_of(name: str) -> Callable[[], Callable[[], object]]:
                return lambda: run_way(name, problem, sizes["depth"], amp)

            runs = {name: way_of(name) for name in WAYS}
        if settings.quick:
            runs = {name: make for name, make in runs.items() if name in QUICK_WAYS}
        return {"fixed": fixed, "ways": {name: _peak(make, settings.device) for name, make in runs.items()}}

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return report.tables(cells)

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        drawn = report.plot(cells, folder / "memory.png")
        return [] if drawn is None else [drawn]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return report.claims(cells)


def _peak(make: Callable[[], Callable[[], object]], device: str) -> dict[str, Any]:
    """One failing way does not lose the others of its cell."""
    try:
        once = make()
        once()  # the first pass allocates what stays
        return {"peak_bytes": peak_bytes(once, device), "reason": ""}
    except Exception as error:
        return {"peak_bytes": None, "reason": reason_of(error)}


register(Memory())
