"""Tables, claims and the plot of ``memory``."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..harness import Claim, Table
from ..solving.pictures import readable_log, save

__all__ = ["AXES", "claims", "plot", "series", "tables"]

AXES = {
    "depth": "iterations",
    "batch": "rows in the batch",
    "side": "height and width of the state",
    "models": "iterations, or layers a stage",
}
PLAIN, OURS, UNROLLED = (
    "torchdeq fixed_point_iter / fixed_point_iter",
    "picard / implicit(picard)",
    "picard / unrolled",
)
GROWTH, SHARE = 1.05, 0.75
PRECISIONS = ("float32", "bfloat16 autocast")

Series = dict[str, dict[int, int | None]]


def on_axis(cells: list[dict[str, Any]], axis: str, precision: str) -> list[dict[str, Any]]:
    """The finished cells of an axis."""
    wanted = (axis, precision)
    return [
        cell
        for cell in cells
        if cell["status"] == "ok"
        and (cell["options"].get("axis"), cell["options"].get("precision")) == wanted
    ]


def series(cells: list[dict[str, Any]], axis: str, precision: str = "float32") -> Series:
    """Peak bytes of each way by the value on an axis; None where it failed."""
    found: Series = {}
    for cell in on_axis(cells, axis, precision):
        options = cell["options"]
        for name, record in cell["data"]["ways"].items():
            found.setdefault(name, {})[options["value"]] = record["peak_bytes"]
    return found


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """One for each axis: megabytes, and how they grow."""
    made = []
    for precision, (axis, title) in product(PRECISIONS, AXES.items()):
        found = series(cells, axis, precision)
        values = sorted({value for by_value in found.values() for value in by_value})
        rows = []
        for name, by_value in found.items():
            known = [v for v in values if by_value.get(v) is not None]
            first, last = (by_value[known[0]], by_value[known[-1]]) if known else (None, None)
            grown = f"{last / first:.2f}x" if first and last else "-"
            rows.append((name, *(_megabytes(by_value.get(v)) for v in values), grown))
        if rows:
            columns = ("way", *(str(v) for v in values), "last over first")
            fixed = on_axis(cells, axis, precision)[0]["data"]["fixed"]
            note = f"Megabytes live at once in forward and backward, above what was live before. {fixed}"
            made.append(Table(f"Peak memory by {title}, MB, {precision}", columns, rows, (note,)))
    return made or [Table("Nothing finished", ("way",), [])]


def _megabytes(value: int | None) -> str:
    return "failed" if value is None else f"{value / 1e6:.3g}"


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """Growth with depth, and the peak beside torchdeq's plain solver and beside unrolling."""
    found = series(cells, "depth")
    values = sorted(found.get(OURS, {}))
    if not values:
        return [Claim("peak memory of forward and backward by depth", "-", "-", "-", "-", "not measured")]
    few, many = values[0], values[-1]
    ours, plain, unrolled = (found.get(name, {}) for name in (OURS, PLAIN, UNROLLED))
    made = [
        _ratio(
            f"peak memory at {many} iterations over {few}, {OURS}",
            ours.get(many),
            ours.get(few),
            f"{GROWTH:g} at most",
            GROWTH,
        ),
        _ratio(
            f"peak memory at {many} iterations, {OURS} over {PLAIN}",
            ours.get(many),
            plain.get(many),
            f"{SHARE:g} at most",
            SHARE,
        ),
        _ratio(
            f"peak memory at {many} iterations, {OURS} over {UNROLLED}", ours.get(many), unrolled.get(many)
        ),
    ]
    models = series(cells, "models")
    implicit, unfolded = (models.get(name, {}) for name in ("TWNN, implicit", "TWNN, unrolled"))
    depths = sorted(implicit)
    if depths:
        one, other = implicit[depths[-1]], unfolded.get(depths[-1])
        made.append(
            _ratio(
                f"peak memory of a training pass, TWNN at {depths[-1]} iterations, implicit over unrolled",
                one,
                other,
            )
        )
    return made


def _ratio(
    what: str, ours: int | None, theirs: int | None, target: str = "none", most: float | None = None
) -> Claim:
    if ours is None or theirs is None:
        return Claim(what, "-", "-", "-", target, "not measured")
    ratio = ours / theirs
    met = "-" if most is None else ("yes" if ratio <= most else "no")
    return Claim(what, f"{_megabytes(theirs)} MB", f"{_megabytes(ours)} MB", f"{ratio:.3f}", target, met)


def plot(cells: list[dict[str, Any]], path: Path) -> Path | None:
    """Peak memory against each axis."""
    drawn = [(axis, series(cells, axis)) for axis in AXES]
    drawn = [(axis, found) for axis, found in drawn if found]
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 4.6), squeeze=False)
    for place, ((axis, found), area) in enumerate(zip(drawn, axes[0], strict=True)):
        for index, (name, by_value) in enumerate(found.items()):
            points = sorted((v, peak / 1e6) for v, peak in by_value.items() if peak)
            dashed = name.startswith(("torchdeq", "DEQ"))
            style = {"ls": "--" if dashed else "-", "color": plt.get_cmap("tab20")(index % 20)}
            if points:
                area.plot(*zip(*points, strict=True), label=name, marker=".", lw=1.1, **style)
        area.set_xscale("log")
        area.set_yscale("log")
        readable_log(area.xaxis)
        readable_log(area.yaxis)
        area.set_xlabel(AXES[axis], fontsize=8)
        if place == 0:
            area.set_ylabel("peak memory, MB", fontsize=8)
        area.grid(alpha=0.25, lw=0.5)
        area.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    figure.tight_layout()
    return save(figure, path)
