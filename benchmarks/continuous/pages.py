"""Tables, plots and claims of ``streaming``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..harness import Claim, Table
from ..solving.pictures import COLOURS, save

__all__ = ["claims", "details", "headline", "plot_fill"]


def _good(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["status"] == "ok"]


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def headline(cells: list[dict[str, Any]]) -> Table:
    """Ratios."""
    rows = []
    for cell in _good(cells):
        data = cell["data"]
        counts = data["counts"]
        launches = counts["batch by batch"]["evaluations"] / counts["stream"]["evaluations"]
        rows.append(
            (
                cell["key"],
                _ratio(data["ratios"]["batch by batch"]),
                _ratio(data["ratios"]["masked"]),
                f"{launches:.2f}",
                f"{100 * data['mean_fill']['batch by batch']:.0f} %",
                f"{100 * data['mean_fill']['stream']:.0f} %",
            )
        )
    columns = (
        *("workload", "seconds: batch by batch / stream", "seconds: masked / stream"),
        *("evaluations: batch by batch / stream", "mean fill, batch by batch", "mean fill, stream"),
    )
    notes = (
        "Medians over interleaved rounds with quartiles; above 1 the stream is faster. The ratio of "
        "evaluations is what it would be if one cost the same for any number of rows, and all else nothing.",
    )
    return Table("Continuous against ordinary batching", columns, rows, notes)


def details(cells: list[dict[str, Any]]) -> Table:
    """Counts and seconds."""
    rows = []
    for cell in _good(cells):
        data = cell["data"]
        quantiles = " / ".join(f"{q:.0f}" for q in data["steps"]["quantiles"])
        for name, counts in data["counts"].items():
            rows.append(
                (
                    cell["key"],
                    name,
                    f"{data['samples']} in {data['batches']}",
                    f"{data['steps']['mean']:.1f}; {quantiles}",
                    str(counts["evaluations"]),
                    str(counts["rows"]),
                    f"{data['seconds'][name]['median']:.3f}",
                    f"{data['difference'] / max(data['scale'], 1e-30):.1e}" if name == "stream" else "",
                )
            )
    columns = (
        *("workload", "candidate", "samples in batches", "steps: mean; 50 / 80 / 95 / 100 %"),
        *("evaluations", "rows evaluated", "seconds", "largest relative difference of outputs"),
    )
    return Table("What was counted", columns, rows, long=True)


def plot_fill(cells: list[dict[str, Any]], path: Path) -> Path:
    """Rows that are not done over the evaluations of a stream, the first seed."""
    good = [cell for cell in _good(cells) if cell["options"]["seed"] == _good(cells)[0]["options"]["seed"]]
    models = list(dict.fromkeys(cell["options"]["model"] for cell in good))
    sizes = sorted({cell["options"]["batch"] for cell in good})
    figure, axes = plt.subplots(
        max(1, len(models)),
        max(1, len(sizes)),
        figsize=(3.6 * max(1, len(sizes)), 2.3 * max(1, len(models))),
        squeeze=False,
    )
    for cell in good:
        axis = axes[models.index(cell["options"]["model"])][sizes.index(cell["options"]["batch"])]
        for name, colour in (("batch by batch", COLOURS["torchdeq"]), ("stream", COLOURS["ours"])):
            fill = cell["data"]["fill"][name]
            axis.plot(fill["evaluation"], fill["rows"], color=colour, lw=1, label=name)
        axis.axhline(cell["options"]["batch"], color="black", lw=0.6, ls=":")
        axis.set_ylim(0, 1.08 * cell["options"]["batch"])
        axis.set_title(f"{cell['options']['model']}, batch {cell['options']['batch']}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    for row in axes:
        row[0].set_ylabel("rows not done", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("evaluation", fontsize=8)
    figure.tight_layout()
    return save(figure, path)


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """One line a workload and batch size."""
    made = []
    for cell in _good(cells):
        data = cell["data"]
        ratio = data["ratios"]["batch by batch"]
        seconds, counts = data["seconds"], data["counts"]
        plain, ours = (
            f"{1e3 * seconds[name]['median']:.0f} ms, {counts[name]['evaluations']} evaluations"
            for name in ("batch by batch", "stream")
        )
        made.append(
            Claim(
                f"continuous batching, {cell['key']}, mean fill {100 * data['mean_fill']['stream']:.0f} %",
                f"batch by batch {plain}",
                ours,
                _ratio(ratio),
                "faster",
                "yes" if ratio["q1"] > 1 else "no",
            )
        )
    return made
