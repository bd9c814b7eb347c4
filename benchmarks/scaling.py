"""``scaling``: what adaptive depth costs where many processes wait for the slowest, and what helps.

A wormhole network is trained on Fashion-MNIST, the steps of its training samples are counted in two epochs,
and updates of 1 to 1024 processes are simulated from them. The two costs of a batch, by rows and by launches,
are those of a full and of an idle device; see :mod:`benchmarks.stragglers.simulate`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .stragglers import pages
from .stragglers.record import POLICIES, config_of, record
from .stragglers.simulate import COSTS, Population, Setting, simulate

__all__ = ["Scaling"]

RANKS = (1, 4, 16, 64, 256, 1024)
BATCHES = (32, 64, 128, 256)
REMEDY_BATCH = 64
REMEDIES = (
    ("dealt", "gate"),
    ("dealt", "previous epoch"),
    ("dealt", "oracle"),
    ("bucketed", "gate"),
    ("bucketed", "previous epoch"),
    ("bucketed", "oracle"),
    ("bucketed and dealt", "previous epoch"),
)
CAPS = (8, 12, 20)
UPDATES = 64


class Scaling(Benchmark):
    """Recorded steps of two networks, and simulated updates of many processes."""

    name = "scaling"
    question = "What does adaptive depth lose to stragglers over many processes, and what gets it back?"
    cpu_only = "simulates many processes from steps that were counted on the CPU"
    no_budget = "counts steps and times nothing"

    def cells(self, settings: Settings) -> list[Cell]:
        return [
            Cell(
                f"{policy}/seed{seed}",
                {
                    "policy": policy,
                    "seed": seed,
                    RECIPE: fingerprint(config_of(policy, seed, settings.quick)),
                },
            )
            for seed in settings.seeds
            for policy in POLICIES
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        found = record(cell.options["policy"], cell.options["seed"], settings.quick)
        ranks, batches = (RANKS[:3], BATCHES[:1]) if settings.quick else (RANKS, BATCHES)
        outside = found["outside"]
        whole = Population.of(found, outside)
        plain = [
            self._one(whole, Setting(n, b, cost), cell) for cost in COSTS for n in ranks for b in batches
        ]
        batch = batches[0] if settings.quick else REMEDY_BATCH
        remedies, caps = [], []
        for cost in COSTS:
            for n in ranks:
                setting = Setting(n, batch, cost)
                remedies += [
                    self._one(whole, replace(setting, plan=plan, predictor=predictor), cell)
                    for plan, predictor in REMEDIES
                ]
                caps += [
                    {"cap": cap, **self._one(Population.of(found, outside, cap), setting, cell)}
                    for cap in CAPS
                ]
        steps = np.asarray(found["steps"])
        return {
            **{key: value for key, value in found.items() if key not in ("steps", "before", "score")},
            # As text: one number a line would make a long file.
            **{key: " ".join(map(str, found[key])) for key in ("steps", "before", "score")},
            "mean_steps": float(steps.mean()),
            "capped_share": {str(cap): float((steps > cap).mean()) for cap in CAPS},
            "forecast": {
                name: float(np.corrcoef(whole.forecast[name], whole.steps)[0, 1])
                if whole.forecast[name].std() and whole.steps.std()
                else None
                for name in ("gate", "previous epoch")
            },
            "plain": plain,
            "remedies": remedies,
            "caps": caps,
        }

    @staticmethod
    def _one(population: Population, setting: Setting, cell: Cell) -> dict[str, Any]:
        random = np.random.default_rng(cell.options["seed"])
        few = setting.plan == "as they come" and setting.ranks < 64
        found = simulate(population, setting, UPDATES * (8 if few else 1), random)
        return {**vars(setting), **{key: round(value, 4) for key, value in found.items()}}

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [pages.recorded(cells), pages.lost(cells), pages.remedies(cells), pages.capped(cells)]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [pages.plot_lost(cells, folder / "lost.png"), pages.plot_steps(cells, folder / "steps.png")]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return pages.claims(cells)


register(Scaling())
