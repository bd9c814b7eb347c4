"""From the cells of ``backward`` to its tables, plot and claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..harness import Claim, Table
from .depth import fastest_implicit
from .headline import number
from .pictures import readable_log, save

__all__ = ["claims", "full_table", "implicit_table", "plot"]

Record = dict[str, Any]
SLACK = 1.1
STYLES = {
    "torchdeq fixed_point_iter / fixed_point_iter": ("#b2582a", "-"),
    "torchdeq fixed_point_iter / phantom(5)": ("#b2582a", ":"),
    "torchdeq fixed_point_iter / phantom(depth)": ("#b2582a", "--"),
    "picard / implicit": ("#1f6f8b", "-"),
    "anderson / implicit": ("#3aa675", "-"),
    "picard / phantom": ("#1f6f8b", ":"),
    "picard / one_step": ("#444444", "-."),
    "picard / unrolled": ("#1f6f8b", "--"),
    "picard / checkpointed": ("#7a5195", (0, (1, 2))),
}
"""The ways that are drawn; the table has all."""


def depths_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished cells that differentiate at a depth."""
    return [c for c in cells if c["status"] == "ok" and c["options"].get("kind") == "depth"]


def pair(cell: dict[str, Any]) -> tuple[Record, Record] | None:
    """torchdeq's fastest implicit backward pass, and our fastest whose gradient is as right."""
    records = cell["data"]["ways"]
    rival = fastest_implicit(records, "torchdeq")
    if rival is None or rival["gradient_error"] is None:
        return None
    mine = fastest_implicit(records, "ours", SLACK * rival["gradient_error"])
    return None if mine is None else (rival, mine)


def _spread(record: Record, key: str) -> str:
    s = record[key]
    return f"{s['median']:.2f} [{s['q1']:.2f}, {s['q3']:.2f}]"


def _timed(record: Record) -> str:
    return f"{record['candidate'].removeprefix('torchdeq ')}, {1e3 * record['backward']['median']:.3g} ms"


def implicit_table(cells: list[dict[str, Any]]) -> Table:
    """Per depth: the fastest implicit backward pass of either side."""
    rows = []
    for cell in depths_of(cells):
        both = pair(cell)
        if both is None:
            rows.append((cell["key"], *["-"] * 5, "no implicit gradient of ours is as right as torchdeq's"))
            continue
        rival, mine = both
        rows.append(
            (
                cell["key"],
                rival["candidate"].removeprefix("torchdeq "),
                f"{1e3 * rival['backward']['median']:.3g}",
                mine["candidate"],
                f"{1e3 * mine['backward']['median']:.3g}",
                _spread(mine, "backward_ratio"),
                f"{number(rival['gradient_error'])} / {number(mine['gradient_error'])}",
            )
        )
    columns = (
        "cell",
        "torchdeq's fastest",
        "ms",
        "our fastest",
        "ms",
        "ratio",
        "gradient error, theirs / ours",
    )
    return Table("Implicit backward passes", columns, rows)


def full_table(cells: list[dict[str, Any]]) -> Table:
    """Every way at every depth; failed ones with their reason."""
    rows = []
    for cell in depths_of(cells):
        for r in cell["data"]["ways"]:
            if r["reason"]:
                rows.append((cell["key"], r["candidate"], *["-"] * 7, r["reason"]))
                continue
            phases = [
                f"{1e3 * r[p]['median']:.3g} [{1e3 * r[p]['q1']:.3g}, {1e3 * r[p]['q3']:.3g}]"
                for p in ("forward", "backward")
            ]
            peak = f"{r['peak_bytes'] / 1e6:.2f}" if r.get("peak_bytes") else "-"
            rows.append(
                (
                    cell["key"],
                    r["candidate"],
                    *phases,
                    str(r["total"]["n"]),
                    number(r["gradient_error"]),
                    str(r["rows"]),
                    str(r["product_rows"]),
                    peak,
                    "",
                )
            )
    columns = (
        "cell",
        "forward / backward",
        "forward ms",
        "backward ms",
        "rounds",
        "gradient error",
        "rows of f",
        "rows of J^T u",
        "peak MB",
        "failed",
    )
    return Table("Every way to differentiate", columns, rows, long=True)


def plot(cells: list[dict[str, Any]], path: Path) -> Path:
    """Backward time, peak memory and gradient error against depth, a row of panels for each problem."""
    chosen = depths_of(cells)
    seed = chosen[0]["options"]["seed"] if chosen else 0
    kinds = dict.fromkeys((c["options"]["problem"], c["options"]["precision"]) for c in chosen)
    figure, axes = plt.subplots(max(1, len(kinds)), 3, figsize=(12, 3.2 * max(1, len(kinds))), squeeze=False)
    for row, (problem, precision) in zip(axes, kinds, strict=False):
        mine = [
            c
            for c in chosen
            if (c["options"]["problem"], c["options"]["precision"]) == (problem, precision)
            and c["options"]["seed"] == seed
        ]
        for axis, (what, label) in zip(row, _PANELS.items(), strict=True):
            for name, (colour, dash) in STYLES.items():
                points = [
                    (c["options"]["depth"], y) for c in mine if (y := _value(c, name, what)) is not None
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, ls=dash, marker="o", ms=3, label=name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            depths = [c["options"]["depth"] for c in mine]
            axis.set_xticks(depths, [str(d) for d in depths])
            axis.set_xticks([], minor=True)
            axis.set_title(f"{problem}{'' if precision == 'float32' else ', bf16'}: {label}", fontsize=9)
            axis.tick_params(labelsize=7)
            readable_log(axis.yaxis)
            axis.grid(alpha=0.25, lw=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("iterations of the forward pass", fontsize=8)
    known = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout()
    figure.legend(
        known.values(), known.keys(), loc="upper center", ncol=3, fontsize=8, bbox_to_anchor=(0.5, 0.0)
    )
    return save(figure, path)


_PANELS = {"backward": "backward, ms", "peak_bytes": "peak memory, MB", "gradient_error": "gradient error"}


def _value(cell: dict[str, Any], name: str, what: str) -> float | None:
    record = next((r for r in cell["data"]["ways"] if r["candidate"] == name), None)
    if record is None or record["reason"]:
        return None
    if what == "backward":
        return 1e3 * record["backward"]["median"]
    value = record.get(what)
    return value / 1e6 if what == "peak_bytes" and value else value


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """Lines of the index page: implicit backward passes, and the memory that unrolling would take."""
    made = []
    for cell in depths_of(cells):
        options = cell["options"]
        where = f"`{options['problem']}`, depth {options['depth']}, seed {options['seed']}"
        if options["precision"] != "float32":
            where += ", bf16"
        both = pair(cell)
        if both is not None:
            rival, mine = both
            made.append(
                Claim(
                    f"implicit backward pass, {where}",
                    _timed(rival),
                    _timed(mine),
                    _spread(mine, "backward_ratio"),
                    "none",
                    "-",
                )
            )
    deepest: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in depths_of(cells):
        key = (cell["options"]["problem"], cell["options"]["precision"])
        if key not in deepest or cell["options"]["depth"] > deepest[key]["options"]["depth"]:
            deepest[key] = cell
    for (problem, precision), cell in deepest.items():
        implicit, unrolled = (
            _value(cell, f"picard / {name}", "peak_bytes") for name in ("implicit", "unrolled")
        )
        if implicit and unrolled:
            where = f"`{problem}`, depth {cell['options']['depth']}"
            where += "" if precision == "float32" else ", bf16"
            made.append(
                Claim(
                    f"peak memory, implicit against unrolled, {where}",
                    f"unrolled, {unrolled:.3g} MB",
                    f"implicit, {implicit:.3g} MB",
                    f"{implicit / unrolled:.3f}",
                    "none",
                    "-",
                )
            )
    return made
