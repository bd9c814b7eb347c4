"""``reasoning``: tasks whose depth grows with the input, and whether the computation follows.

The weights that ship, tested at sizes from those of their training to many times as large, with the
solver choosing the number of steps; with several ``--seeds`` the models and their baselines are also
trained and every seed is reported. Pathfinder is trained on contours of 6 dashes, and with ``--full`` of
14, at 32 and at 64 pixels, and of 2 to 9 at 64 pixels, told which have a dot, to be tested on longer ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.tasks import Recipe, recipe_for

from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .reason import measure, pictures, tables

__all__ = ["Reasoning"]

TESTED = {
    "twnn_prefix": {32: 1000, 44: 1000, 128: 1000, 512: 10_000, 4096: 100},
    "twnn_maze": {9: 1000, 13: 10_000, 33: 1000, 59: 300, 201: 10},
}
QUICK_TESTED = {"twnn_prefix": {32: 20, 64: 20}, "twnn_maze": {9: 20, 13: 20}}
DYNAMICS = {"twnn_prefix": (128, 200, 400), "twnn_maze": (33, 100, 600)}
QUICK_DYNAMICS = {"twnn_prefix": (32, 8, 60), "twnn_maze": (9, 8, 60)}
TASK = {"prefix": "prefix_sums", "maze": "mazes", "pathfinder": "pathfinder"}
RETRAINED = {
    "prefix": {32: 1000, 44: 1000, 128: 1000, 512: 1000},
    "maze": {9: 1000, 13: 1000, 33: 200, 59: 40},
}
KINDS = ("twnn", "ff", "rnn", "deq")
SMALLER: dict[str, Any] = {
    "size": 6,
    "easier": (2, 3, 4, 5),
    "graded": (5, 9),
    "updates": 2500,
    "passed": 0.0,
}
"""Pathfinder at a size that takes minutes to train; the recipe's own takes a quarter of an hour, at 64 pixels
an hour and more."""
LONG = {6: 4000, 9: 4000, 14: 4000}
TRACED: dict[str, Any] = {
    "pixels": 64,
    "size": 9,
    "easier": tuple(range(2, 9)),
    "passed": 0.0,
    "grown": 0.35,
    "traced": 1.0,
    "batch_size": 32,
    "updates": 4000,
    "clutter": 4,
}
"""Contours of up to 9 dashes, told which have a dot: so tracing is learnt, and longer ones are read, too.
With clutter that grows with the length, a row of dashes without a dot would give the answer away."""
CONTOURS: dict[str, tuple[str, dict[str, Any], dict[int, int]]] = {
    "twnn_pathfinder/6": ("twnn_pathfinder", SMALLER, {6: 4000}),
    "ff_pathfinder/6": ("ff_pathfinder", SMALLER, {6: 4000}),
    "twnn_pathfinder/14": ("twnn_pathfinder", {}, LONG),
    "ff_pathfinder/14": ("ff_pathfinder", {}, LONG),
    "twnn_pathfinder/64px": ("twnn_pathfinder", {"pixels": 64, "graded": (16, 28)}, LONG),
    "ff_pathfinder/64px": ("ff_pathfinder", {"pixels": 64}, LONG),
    "ff_pathfinder/64px, halved twice": (
        "ff_pathfinder",
        {"pixels": 64, "model_kwargs": {"downsample": 2}},
        LONG,
    ),
    "twnn_pathfinder/traced": (
        "twnn_pathfinder",
        {
            **TRACED,
            "lr": 3e-3,
            "graded": (11, 15),
            "beyond": 20,
            "carried": 0.5,
            "apart": True,
            "model_kwargs": {"downsample": 2, "width": 16, "stem_width": 16, "reach": 1, "questions": 2},
        },
        LONG,
    ),
    "ff_pathfinder/traced": (
        "ff_pathfinder",
        {**TRACED, "lr": 4e-3, "model_kwargs": {"width": 12, "depth": 3, "downsample": 2, "questions": 2}},
        LONG,
    ),
}
"""Pathfinder by variant: the model, what is changed in its recipe, and examples by length; those of 6 dashes
are trained without ``--full``, too. At 64 pixels the feed-forward net sees contours of 14 dashes from end to
end only if the image is halved twice."""


class Reasoning(Benchmark):
    """Prefix sums, mazes and Pathfinder."""

    name = "reasoning"
    question = "On tasks that need depth, does the computation follow the input, and how far beyond training?"
    scales = True
    no_budget = "trains for a fixed number of updates"

    def cells(self, settings: Settings) -> list[Cell]:
        tested = QUICK_TESTED if settings.quick else TESTED
        looked_at = QUICK_DYNAMICS if settings.quick else DYNAMICS
        cells = [
            Cell(
                f"{model}/size{size}",
                {
                    "kind": "shipped",
                    "model": model,
                    "task": _task(model),
                    "size": size,
                    "count": count,
                    "seed": 1000,
                },
            )
            for model, sizes in tested.items()
            for size, count in sizes.items()
        ]
        cells += [
            Cell(
                f"{model}/dynamics{size}",
                {
                    "kind": "dynamics",
                    "model": model,
                    "size": size,
                    "count": count,
                    "most": most,
                    "seed": 1001,
                },
            )
            for model, (size, count, most) in looked_at.items()
        ]
        return cells + self.trained(settings)

    @staticmethod
    def trained(settings: Settings) -> list[Cell]:
        """Trainings: with several seeds, or a few updates each when quick."""
        if len(settings.seeds) < 2 and not settings.quick:
            return []
        contours = [name for name in CONTOURS if settings.full or name.endswith("/6")]
        names = [f"{kind}_{task}" for task in RETRAINED for kind in KINDS] + contours
        return [
            Cell(
                f"train/{name}/seed{seed}",
                {
                    "kind": "retrained",
                    "model": name,
                    "seed": seed,
                    RECIPE: fingerprint(*_training(name, seed, settings.quick)),
                },
            )
            for seed in settings.seeds
            for name in names
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        o = cell.options
        if o["kind"] == "shipped":
            amp = o.get("precision", "float32") != "float32"
            return measure.shipped(o["model"], o["size"], o["count"], o["seed"], settings.device, amp)
        if o["kind"] == "dynamics":
            return measure.dynamics(o["model"], o["size"], o["count"], o["most"], o["seed"], settings.device)
        values, sizes = _training(o["model"], o["seed"], settings.quick)
        return measure.retrained(Recipe.from_dict(values), sizes, settings.device)

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        found = [tables.shipped_table(cells), tables.dynamics_table(cells), tables.retrained_table(cells)]
        return [table for table in found if table.rows]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        drawn = [
            pictures.steps(cells, folder / "steps.png"),
            pictures.iterations(cells, folder / "iterations.png"),
        ]
        return [path for path in drawn if path is not None]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return tables.claims(cells)


def _task(model: str) -> str:
    return TASK[model.partition("_")[2]]


def _training(name: str, seed: int, quick: bool) -> tuple[dict[str, Any], dict[int, int]]:
    """The whole recipe of a model or variant that is trained, and examples by size that it is tested on."""
    model, changes, sizes = CONTOURS.get(name, (name, {}, RETRAINED.get(name.partition("_")[2], {})))
    if quick:
        changes, sizes = {**changes, "updates": 3}, {min(sizes): 20}
    return recipe_for(model, seed=seed, **changes).as_dict(), sizes


register(Reasoning())
