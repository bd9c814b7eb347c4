"""``streaming``: continuous batching (``tw.stream``) against ordinary batching, on mixed difficulty.

Three workloads (:mod:`benchmarks.continuous.models`), each with 80 % easy, 15 % medium and 5 % hard samples
in random order, run as one stream of batches by three candidates:

- ``batch by batch``: ``model(batch)``; settled rows leave their batch, and nobody takes their places;
- ``masked``: the same with every row evaluated until the slowest of its batch is done;
- ``stream``: ``tw.stream(model, batches)``.

Seconds depend on whether an evaluation for few rows is cheaper than one for many: on a CPU it mostly is, and
leaving alone does the job; where launches are the time, the number of evaluations is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import twnn_plugin as tw

from .continuous import pages
from .continuous.models import MODELS, Masked, Workload, build_workload
from .harness import (
    Benchmark,
    Cell,
    Claim,
    Settings,
    Stopwatch,
    Table,
    interleave,
    ratio_of,
    register,
    spread_of,
)

__all__ = ["Streaming"]

BATCHES = (4, 16, 64)
IN_FLIGHT = 8
POINTS = 150  # of the recorded fill


class Streaming(Benchmark):
    """Three workloads at three batch sizes."""

    name = "streaming"
    question = "How much faster is continuous batching than ordinary batching on mixed difficulty?"

    def cells(self, settings: Settings) -> list[Cell]:
        return [
            Cell(f"{name}/batch{batch}/seed{seed}", {"model": name, "batch": batch, "seed": seed})
            for seed in settings.seeds
            for name in MODELS
            for batch in (BATCHES[:1] if settings.quick else BATCHES)
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        batch, seed = cell.options["batch"], cell.options["seed"]
        count = 40 if settings.quick else max(96, min(16 * batch, 512))
        work = build_workload(cell.options["model"], count, seed, settings.device)
        batches = list(work.samples.split(batch))
        candidates = _candidates(work, batches)
        counts, outputs = {}, {}
        for name, run in candidates.items():
            counts[name], outputs[name] = _counted(work, run, len(batches))
        stream = tw.stream(work.model, batches, in_flight=IN_FLIGHT)
        for _ in stream:
            pass
        laps = interleave(
            {name: _timed(run) for name, run in candidates.items()},
            device=settings.device,
            budget_s=(0.5 if settings.quick else 30.0) * settings.budget,
            max_rounds=3 if settings.quick else 20,
            seed=seed,
            slow_factor=3.0,
        )
        seconds = {name: [lap["total"] if lap else None for lap in one] for name, one in laps.items()}
        steps = work.steps.cpu()
        return {
            "samples": count,
            "batches": len(batches),
            "steps": {
                "mean": float(steps.float().mean()),
                "quantiles": torch.quantile(steps.float(), torch.tensor([0.5, 0.8, 0.95, 1.0])).tolist(),
            },
            "counts": counts,
            "difference": float((outputs["stream"] - outputs["batch by batch"]).abs().max()),
            "scale": float(outputs["batch by batch"].abs().max()),
            "mean_fill": {
                "batch by batch": sum(_ordinary_fill(steps, batch)) / batch / _slowest(steps, batch),
                "stream": stream.report.mean_fill,
            },
            "fill": {
                "batch by batch": _thinned(_ordinary_fill(steps, batch)),
                "stream": _thinned(stream.report.fill),
            },
            "seconds": {
                name: spread_of([s for s in one if s is not None]).as_json() for name, one in seconds.items()
            },
            "ratios": {
                name: ratio_of(seconds[name], seconds["stream"]).as_json()
                for name in seconds
                if name != "stream"
            },
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [pages.headline(cells), pages.details(cells)]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [pages.plot_fill(cells, folder / "fill.png")]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return pages.claims(cells)


def _candidates(work: Workload, batches: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    def plain(solver: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            work.set_solver(solver)
            with torch.no_grad():
                return torch.cat([work.model(batch) for batch in batches])

        return run

    def stream() -> Tensor:
        work.set_solver(tw.solver("anderson"))
        return torch.cat(list(tw.stream(work.model, batches, in_flight=IN_FLIGHT, records=False)))

    anderson: Any = tw.solver("anderson")
    return {"batch by batch": plain(anderson), "masked": plain(Masked(anderson)), "stream": stream}


def _counted(work: Workload, run: Callable[[], Tensor], passes: int) -> tuple[dict[str, int], Tensor]:
    """Evaluations of the solved map and rows in them; what came out."""
    sizes: list[int] = []
    handle = work.probe.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    try:
        output = run()
    finally:
        handle.remove()
    rows = sum(sizes) - work.outside * work.samples.shape[0]
    return {"evaluations": len(sizes) - work.outside * passes, "rows": rows}, output


def _timed(run: Callable[[], Tensor]) -> Callable[[Stopwatch], None]:
    def once(watch: Stopwatch) -> None:
        run()
        watch.lap("forward")

    return once


def _ordinary_fill(steps: Tensor, batch: int) -> list[int]:
    """Rows that are not done at each evaluation, batch by batch."""
    fill: list[int] = []
    for part in steps.split(batch):
        fill += [int((part >= k).sum()) for k in range(1, int(part.max()) + 1)]
    return fill


def _slowest(steps: Tensor, batch: int) -> int:
    return sum(int(part.max()) for part in steps.split(batch))


def _thinned(fill: list[int]) -> dict[str, list[float]]:
    """Means over equal stretches, with the number of the evaluation in their middle."""
    stretch = max(1, -(-len(fill) // POINTS))
    parts = [fill[i : i + stretch] for i in range(0, len(fill), stretch)]
    return {
        "evaluation": [i * stretch + len(part) / 2 for i, part in enumerate(parts)],
        "rows": [round(sum(part) / len(part), 2) for part in parts],
    }


register(Streaming())
