"""``wormholes``: what a wormhole buys in accuracy, and at what cost, against controls.

Two tasks (:mod:`benchmarks.training.tasks`): digits in clutter, one of which a mark at the margin asks for,
and Fashion-MNIST. On each the plain backbone, the same trained longer, wider and deeper ones, and the
backbone with a wormhole, every cell one training run with one seed.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .training import pictures, report
from .training.judge import judge_plain, judge_wormhole
from .training.loop import fit, forward_cost
from .training.tasks import QUICK, TASKS, build, parts

__all__ = ["Wormholes"]


class Wormholes(Benchmark):
    """Accuracy against multiply-adds, with a wormhole and without."""

    name = "wormholes"
    question = (
        "What does a wormhole buy in accuracy, at which cost, against longer, wider and deeper networks?"
    )
    cpu_only = "trains tiny networks, for which a GPU has nothing to do"
    no_budget = "trains for a fixed number of epochs"

    def cells(self, settings: Settings) -> list[Cell]:
        tasks = QUICK if settings.quick else TASKS
        return [
            Cell(
                f"{task.name}/{arm.name}/seed{seed}",
                {
                    "task": task.name,
                    "arm": arm.name,
                    "seed": seed,
                    RECIPE: fingerprint(replace(task, title="", arms=()), replace(arm, title="")),
                },
            )
            for task in tasks.values()
            for seed in settings.seeds
            for arm in task.arms
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        task = (QUICK if settings.quick else TASKS)[cell.options["task"]]
        arm = task.arm(cell.options["arm"])
        made = parts(task.dataset, task.img_size, task.rows, settings.quick)
        model, spent = fit(task, arm, made["train"], cell.options["seed"])
        cost = forward_cost(build(task, arm), made["train"].images[:1])
        data: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "cost": cost,
            "training": spent,
            "recipe": asdict(task.recipe),
        }
        if arm.opening is None:
            return {**data, **judge_plain(model, made)}
        return {**data, **judge_wormhole(model, arm.opening, made, cost)}

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return report.tables(cells)

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return pictures.plots(cells, folder)

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return report.claims(cells)


register(Wormholes())
