"""``solvers``: our solvers against all of torchdeq's, at equal tolerance and at equal gradient error.

The views, the target of the gradient error and what counts as converged are in
:mod:`benchmarks.solving.compare`; the problems in :mod:`benchmarks.solving.problems`; torchdeq's settings and
where they come from in :mod:`benchmarks.solving.candidates`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .harness import Benchmark, Cell, Claim, Settings, Table, register
from .solving import bounds, headline, pictures
from .solving.candidates import Candidate, ours, torchdeqs
from .solving.compare import compare
from .solving.measure import Bench
from .solving.overhead import ITERATIONS, overhead
from .solving.problems import NAMES, build
from .solving.reference import reference_of

__all__ = ["Solvers", "bench_of"]

QUICK = {"a": 16, "b": 4, "c": 32, "easy": 8}
CUDA_BATCH = {"b": 64, "c_conv": 64, "resnet_span": 64}
PRECISIONS = ("float32", "bfloat16 autocast")
TOLERANCES = {"float32": (1e-3, 1e-5), "bfloat16 autocast": (1e-2,)}


def bench_of(
    problem: str, seed: int, device: str, precision: str = "float32", batch: int | None = None
) -> Bench:
    """A problem on a device beside its float64 reference."""
    built = build(problem, seed, batch or (CUDA_BATCH.get(problem) if device == "cuda" else None))
    reference = reference_of(built.to(torch.float64, device))
    return Bench(built, reference, device, autocast=precision != "float32")


TRACED = {
    "torchdeq fixed_point_iter / fixed_point_iter",
    "torchdeq anderson / anderson",
    "torchdeq broyden / broyden",
    "picard / implicit",
    "picard / implicit(picard)",
    "anderson / implicit",
    "auto / implicit",
}
"""Whose peak memory is measured on a CPU, where tracing takes thirty times as long as the run."""


def memory_of(candidates: list[Candidate], device: str, quick: bool) -> set[str]:
    """Whose peak memory is measured."""
    if quick:
        return {"torchdeq fixed_point_iter / fixed_point_iter"}
    return {c.name for c in candidates} if device == "cuda" else TRACED


class Solvers(Benchmark):
    """Forward, and forward with backward, on problems of known difficulty."""

    name = "solvers"
    question = "How fast are our solvers beside torchdeq's, forward and with the gradient, equally accurate?"

    def cells(self, settings: Settings) -> list[Cell]:
        names = tuple(QUICK) if settings.quick else NAMES
        return [
            *self.problem_cells(names, settings, "float32"),
            *(
                Cell(f"overhead/{problem}", {"kind": "overhead", "problem": problem, "seed": 0})
                for problem in ITERATIONS
            ),
        ]

    @staticmethod
    def problem_cells(names: tuple[str, ...], settings: Settings, precision: str) -> list[Cell]:
        """One cell for each problem and seed."""
        short = "" if precision == "float32" else "/bf16"
        return [
            Cell(
                f"{problem}{short}/seed{seed}",
                {"kind": "problem", "problem": problem, "seed": seed, "precision": precision},
            )
            for seed in settings.seeds
            for problem in names
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        problem, seed = cell.options["problem"], cell.options["seed"]
        batch = QUICK.get(problem) if settings.quick else None
        convolutional = problem in CUDA_BATCH and settings.device == "cpu"
        candidates = [*torchdeqs(settings.quick), *ours(settings.quick, few=convolutional)]
        rounds = 3 if settings.quick else 30
        budget = (0.3 if settings.quick else 4.0) * settings.budget
        if cell.options["kind"] == "overhead":
            bench = bench_of(problem, seed, settings.device, batch=batch)
            records = overhead(bench, candidates, budget_s=budget, max_rounds=rounds, seed=seed)
            return {"overhead": records}
        precision = cell.options["precision"]
        bench = bench_of(problem, seed, settings.device, precision, batch)
        tolerances = TOLERANCES[precision][: 1 if settings.quick else None]
        memory = memory_of(candidates, settings.device, settings.quick)
        return {
            "device": settings.device,
            "batch": bench.problem.batch,
            "reference_residual": list(bench.reference.residual),
            "comparisons": [
                compare(
                    bench,
                    candidates,
                    tol,
                    budget_s=budget,
                    max_rounds=rounds,
                    seed=seed,
                    memory=memory if tol == tolerances[0] else (),
                )
                for tol in tolerances
            ],
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [
            headline.target_table(cells),
            headline.ratio_table(cells),
            bounds.bound_table(cells),
            headline.overhead_table(cells),
            *headline.full_tables(cells),
        ]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [pictures.ratios(cells, folder / "ratios.png"), pictures.work(cells, folder / "work.png")]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return headline.claims(cells)


register(Solvers())
