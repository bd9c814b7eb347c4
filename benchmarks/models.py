"""``models``: accuracy against cost of plain networks, TWNN, DynaLay and torchdeq's equilibrium models.

The networks, their settings and where these come from are in :mod:`benchmarks.modelling.arms`; how they are
trained in :mod:`benchmarks.modelling.train`; what is measured in :mod:`benchmarks.modelling.judge`. The
default is a small scale that fits one core; ``--full`` takes all images at their own size and the whole
training.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo.data import SPECS, load_data
from zoo.errors import DataError

from .harness import RECIPE, BenchError, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .modelling import pictures, report
from .modelling.arms import SCALES, arms
from .modelling.judge import data_of, judge
from .modelling.networks import Shape
from .modelling.train import fit

__all__ = ["Models", "present"]

DATASETS = ("fashion_mnist", "cifar10", "cifar100")
"""Each takes part where it is present; nothing is fetched."""
PRECISIONS = {"float32": "", "bfloat16 autocast": "/bf16"}


@lru_cache
def present(dataset: str) -> bool:
    """Whether the set is on this machine."""
    try:
        load_data(dataset)
    except DataError:
        return False
    return True


class Models(Benchmark):
    """One cell for each network and seed on each data set."""

    name = "models"
    question = (
        "What do wormholes, layer selection and equilibrium layers cost and give, beside plain networks?"
    )
    scales = True

    def cells(self, settings: Settings) -> list[Cell]:
        names = tuple(arm.name for arm in arms(settings.quick))
        sets = [name for name in (DATASETS[:1] if settings.quick else DATASETS) if present(name)]
        scale = "quick" if settings.quick else ("full" if settings.full else "small")
        return self.model_cells(settings, names, sets, scale)

    @staticmethod
    def model_cells(
        settings: Settings, names: tuple[str, ...], sets: list[str], scale: str, precision: str = "float32"
    ) -> list[Cell]:
        """One cell for each data set, seed and network."""
        recipes = {arm.name: replace(arm, title="", source="") for arm in arms(quick=False)}
        return [
            Cell(
                f"{dataset}/{name}{PRECISIONS[precision]}/seed{seed}",
                {
                    "kind": "model",
                    "dataset": dataset,
                    "arm": name,
                    "seed": seed,
                    "precision": precision,
                    "scale": scale,
                    RECIPE: fingerprint(SCALES[scale], recipes[name]),
                },
            )
            for dataset in sets
            for seed in settings.seeds
            for name in names
        ]

    def check(self, settings: Settings) -> None:
        if not any(present(name) for name in DATASETS):
            raise BenchError(
                f"None of {', '.join(DATASETS)} is on this machine: put one into $TWNN_DATA_DIR, or fetch it "
                "with 'twnn train --dataset NAME --dataset-download'."
            )

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        options = cell.options
        scale = SCALES[options["scale"]]
        arm = next(arm for arm in arms(quick=False) if arm.name == options["arm"])
        spec = SPECS[options["dataset"]]
        size = scale.img_size or spec.img_size
        shape = Shape(spec.in_chans, spec.num_classes, size, scale.name)
        made = data_of(options["dataset"], scale, settings.quick)
        amp = options["precision"] != "float32"
        run, training = fit(arm, shape, scale, made, options["seed"], settings.device, amp)
        budget = (0.1 if settings.quick else 2.0) * settings.budget
        return {
            "data": f"{options['dataset']}, {len(made['train'].labels)} images, {size}x{size}",
            "share": arm.share_of(scale.name),
            "training": training,
            **judge(run, shape, budget, settings.device),
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return report.tables(cells)

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return pictures.plots(cells, folder)

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return report.claims(cells)


register(Models())
