"""``gpu``: the set for one GPU, float32 and bfloat16 autocast, within eight minutes on an H200-class one.

The cells are those of other benchmarks, at a size that fits the time: ``solvers``, ``backward``,
``models`` (whose network ``twnn`` is trained as in ``wormholes``), ``memory``, and the weights of
``reasoning`` that ship. The most important come first; those that would begin after seven minutes, or end
after seven and a half if they took as long as the longest of their kind before them, are not run, stay in the
table as such, and are run by ``--resume``. Nothing is fetched from the network; the results are eight small
files. A copy without a git history says of which commit it is by the environment variable ``TWNN_COMMIT``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .backward import QUICK_DEPTHS, Backward
from .harness import BenchError, Benchmark, Cell, Claim, Settings, Table, find, register
from .memory import Memory
from .models import Models, present
from .reasoning import TASK
from .solvers import PRECISIONS, QUICK, Solvers

__all__ = ["Gpu"]

PROBLEMS = ("easy", "c", "a_hard", "b", "c_conv")
DEPTHS = {"a_hard": (5, 50, 200), "conv_slow": (5, 50)}
AXES: dict[str, tuple[int, ...]] = {"depth": (5, 50), "models": (5, 20)}
QUICK_AXES: dict[str, tuple[int, ...]] = {"depth": (3, 8)}
NETWORKS = ("plain", "twnn", "dynalay", "cnn3", "deq", "deq_ours", "deq_phantom")
REASONED = {"twnn_prefix": (512, 200), "twnn_maze": (13, 200)}
QUICK_REASONED = {"twnn_prefix": (32, 8)}
BUDGET = 0.25  # of the seconds that a cell may take on a CPU
LAST_START_S = 420.0
LAST_END_S = 450.0  # half a minute is left for starting up, and for tables and plots


class OutOfTime(RuntimeError):
    """The set must end within its time."""


class Gpu(Benchmark):
    """The headline figures on a GPU, in both precisions."""

    name = "gpu"
    question = "The same on a GPU, in float32 and under bfloat16 autocast?"

    def __init__(self) -> None:
        self._begin: float | None = None
        self._longest: dict[str, float] = {}  # seconds, by kind of cell

    def check(self, settings: Settings) -> None:
        if settings.device != "cuda" and not settings.quick:
            raise BenchError(
                "The benchmark 'gpu' runs on CUDA: leave --device away. To try it on a CPU, add --quick."
            )
        self._begin = None
        self._longest = {}

    def cells(self, settings: Settings) -> list[Cell]:
        quick = settings.quick
        problems = tuple(QUICK)[:1] if quick else PROBLEMS
        depths = {"a_hard": QUICK_DEPTHS["a_hard"][:1]} if quick else DEPTHS
        found: list[Cell] = []
        for precision in PRECISIONS:
            found += Solvers.problem_cells(problems, settings, precision)
        overhead = [c for c in find("solvers").cells(settings) if c.options["kind"] == "overhead"]
        found += overhead[: 1 if quick else None]
        for precision in PRECISIONS:
            found += Backward.depth_cells(depths, settings, precision)
        for precision in PRECISIONS:
            found += self._newer(settings, precision)
        return found

    @staticmethod
    def _newer(settings: Settings, precision: str) -> list[Cell]:
        """Models, memory, and the reasoning weights."""
        quick = settings.quick
        # scikit-learn's digits are on every machine.
        sets = ["fashion_mnist"] if present("fashion_mnist") else ["digits"]
        names = ("plain", "twnn") if quick else NETWORKS
        found = Models.model_cells(settings, names, sets, "quick" if quick else "gpu", precision)
        found += Memory.axis_cells(QUICK_AXES if quick else AXES, precision)
        short = "" if precision == "float32" else "/bf16"
        for model, (size, count) in (QUICK_REASONED if quick else REASONED).items():
            options: dict[str, Any] = {
                "kind": "shipped",
                "model": model,
                "size": size,
                "count": count,
                "seed": 1000,
            }
            options |= {"task": TASK[model.partition("_")[2]], "precision": precision}
            found.append(Cell(f"{model}/size{size}{short}", options))
        return found

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        kind, now = cell.options["kind"], time.monotonic()
        if self._begin is None:
            self._begin = now
        spent, needed = now - self._begin, self._longest.get(kind, 0.0)
        if settings.device == "cuda" and (spent > LAST_START_S or spent + needed > LAST_END_S):
            raise OutOfTime(f"not run: after {spent:.0f} seconds it might end too late; --resume runs it")
        shorter = Settings(
            settings.device, settings.quick, settings.seeds, settings.threads, (), BUDGET * settings.budget
        )
        try:
            return find(OWNERS[kind]).run_cell(cell, shorter)
        finally:
            self._longest[kind] = max(needed, time.monotonic() - now)

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [
            table
            for name in PARTS
            for table in find(name).tables(_of(cells, name))
            if name in OLD or table.rows
        ]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        # Those of ``reasoning`` would make the files too many.
        drawn = (name for name in PARTS if name != "reasoning")
        return [path for name in drawn for path in find(name).plots(_of(cells, name), folder)]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return [claim for name in PARTS for claim in find(name).claims(_of(cells, name))]


OWNERS = {
    "problem": "solvers",
    "overhead": "solvers",
    "depth": "backward",
    "model": "models",
    "memory": "memory",
    "shipped": "reasoning",
}
OLD = ("solvers", "backward")
PARTS = (*OLD, "models", "memory", "reasoning")


def _of(cells: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [cell for cell in cells if OWNERS[cell["options"]["kind"]] == name]


register(Gpu())
