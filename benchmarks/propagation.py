"""``propagation``: forward propagation that neither explodes nor dies, and learning at depth 1000.

The experiments of Gonzalez & Mang (2018), figures 2 and 3, are in :mod:`benchmarks.propagating.phase`; the
networks and how they are tuned in :mod:`benchmarks.propagating.nets`; what is measured on them in
:mod:`benchmarks.propagating.learn`. The seeds of a run are trained within each cell, as the first one's
validation accuracy chooses the setting for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register
from .propagating import pictures, report
from .propagating.learn import SMOOTH, learn, smoothing
from .propagating.nets import settings_of
from .propagating.phase import figure2, figure3

__all__ = ["Propagation"]

SETS = ("peaks", "swiss_roll", "circles")
DEPTHS = (8, 50, 200, 1000)
QUICK_DEPTHS = (4, 16)
STEPS, QUICK_STEPS = 150, 20
DRAWN = (8, 1000)
ORDER = ("hamiltonian", "antisymmetric", "resnet", "euler", "resnet, scaled")


class Propagation(Benchmark):
    """The poster's figures, then accuracy, gradients and distances of deep networks."""

    name = "propagation"
    question = "Which residual layers keep signals apart and bounded, and can be trained a thousand deep?"
    cpu_only = "trains tiny networks, for which a GPU has nothing to do"
    no_budget = "trains for a fixed number of steps"

    def cells(self, settings: Settings) -> list[Cell]:
        depths = QUICK_DEPTHS if settings.quick else DEPTHS
        steps = QUICK_STEPS if settings.quick else STEPS
        sets = SETS[-1:] if settings.quick else SETS
        cells = [Cell("figure2", {"kind": "figure2"}), Cell("figure3", {"kind": "figure3"})]
        cells += [
            Cell(
                f"{name}/{net.replace(', ', '-')}/depth{depth}",
                {
                    "kind": "learn",
                    "set": name,
                    "net": net,
                    "depth": depth,
                    RECIPE: fingerprint(settings.seeds, steps, settings_of(net)),
                },
            )
            for depth in depths  # the dearest last
            for net in ORDER
            for name in sets
        ]
        depth = depths[1]
        cells += [
            Cell(
                f"smooth/{net}/depth{depth}",
                {
                    "kind": "smooth",
                    "set": "peaks",
                    "net": net,
                    "depth": depth,
                    RECIPE: fingerprint(settings.seeds, steps, settings_of(net), SMOOTH),
                },
            )
            for net in (("hamiltonian",) if settings.quick else ("antisymmetric", "hamiltonian"))
        ]
        return cells

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        options = cell.options
        if options["kind"] == "figure2":
            return {"panels": figure2()}
        if options["kind"] == "figure3":
            return {"readings": figure3()}
        steps = QUICK_STEPS if settings.quick else STEPS
        common: dict[str, Any] = {"seeds": settings.seeds, "steps": steps, "quick": settings.quick}
        where = (options["set"], options["net"], options["depth"])
        if options["kind"] == "smooth":
            return smoothing(*where, **common)
        draw = options["depth"] in (QUICK_DEPTHS if settings.quick else DRAWN)
        return learn(*where, **common, draw=draw)

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return report.tables(cells)

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return pictures.plots(cells, folder)

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return report.claims(cells)


register(Propagation())
