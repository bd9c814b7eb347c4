"""Tables and claims of ``reasoning``, from the data of its cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..harness import Claim, Table

__all__ = ["PUBLISHED", "claims", "dynamics_table", "retrained_table", "shipped_table"]

Record = dict[str, Any]

PUBLISHED = {
    ("prefix_sums", 512): "97.12 ± 1.88 % (3.1 M parameters)",
    ("mazes", 13): "99.9 % (0.78 M)",
    ("mazes", 59): "97.30 ± 0.68 % (0.78 M)",
    ("mazes", 201): "74 %",
}
"""Bansal et al. (2022), recall and progressive loss; the best iteration chosen on the test set."""

_TARGETS = {
    ("prefix_sums", 512): 0.999,
    ("prefix_sums", 4096): 0.999,
    ("mazes", 13): 0.999,
    ("mazes", 59): 0.973,
}
_AIMS = {("mazes", 59): "99.5 %", ("mazes", 201): "95 %"}


_TRAINED = {
    "6": "contours of 6 dashes",
    "14": "contours of 14 dashes",
    "64px": "64 pixels, contours of up to 14 dashes",
    "traced": "64 pixels, contours of up to 9 dashes, told which have a dot and where these end without",
}
"""Variants of Pathfinder."""


def _done(cells: list[Record], kind: str) -> list[Record]:
    return [c for c in cells if c["status"] == "ok" and c["options"]["kind"] == kind]


def _share(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _rank(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def shipped_table(cells: list[Record]) -> Table:
    """The weights that ship, by size."""
    rows = []
    for cell in _done(cells, "shipped"):
        o, d = cell["options"], cell["data"]
        ranks = ", ".join(f"{k} {_rank(v)}" for k, v in d["rank_correlation"].items())
        rows.append(
            (
                o["model"],
                str(o["size"]),
                f"{d['samples']:,}",
                f"{_share(d['right'])} ({d['wrong']} wrong)",
                PUBLISHED.get((o["task"], o["size"]), ""),
                _share(d["converged"]),
                str(d["converged_and_wrong"]),
                f"{d['mean_steps']:.1f} ({d['least_steps']} to {d['most_steps']})",
                ranks,
            )
        )
    return Table(
        "Shipped weights on held-out examples",
        (
            *("model", "size", "examples", "entirely right", "published", "converged", "converged and wrong"),
            *("steps", "rank correlation of steps with"),
        ),
        rows,
        (
            "Size: bits, or units of the benchmark. The number of steps is the solver's: largest change at "
            "any position under 0.01 of the rms state. No label is looked at.",
            "Published: Bansal et al. (2022), recall and progressive loss, best iteration chosen afterwards.",
            "Difficulties: ones: number of 1s; run: longest run of equal bits; path: cells along the path; "
            "dead_end: depth of the deepest dead end seen from the path, the distance that the information "
            "travels that closes it; reach: largest distance of a cell from the start or the end.",
        ),
    )


def dynamics_table(cells: list[Record]) -> Table:
    """Alignment and the iterations that accuracy needs."""
    rows = []
    for cell in _done(cells, "dynamics"):
        o, d = cell["options"], cell["data"]
        top = max(d["right"])
        first = next(k for k, r in zip(d["iterations"], d["right"], strict=True) if r == top)
        rows.append(
            (
                o["model"],
                str(o["size"]),
                f"{_share(top)} at {first}",
                f"{_share(d['right'][-1])} at {d['iterations'][-1]}",
                f"{_share(d['solver']['right'])} at {d['solver']['mean_steps']:.1f}",
                f"{d['alignment']['cosine']:.4f}",
                _share(d["alignment"]["answers"]),
            )
        )
    return Table(
        "Accuracy against iterations, and path independence",
        ("model", "size", "best", "last", "solver's choice (mean)", "alignment", "same answers"),
        rows,
        (
            "Best: the highest share entirely right and the first iteration that has it; last: after many "
            "more; both without a stopping rule.",
            "Alignment: asymptotic alignment (Anil et al. 2022), mean cosine of the states reached from zero "
            "and from another example's end state. A latching cell keeps what it starts with: it is to be "
            "started from zero, and its alignment says so.",
        ),
    )


def retrained_table(cells: list[Record]) -> Table:
    """Every seed of every model that was trained."""
    rows = []
    for cell in _done(cells, "retrained"):
        o, d = cell["options"], cell["data"]
        for size, t in d["tested"].items():
            rows.append(
                (
                    o["model"],
                    str(o["seed"]),
                    f"{d['parameters']:,}",
                    str(d["recipe"]["updates"]),
                    size,
                    f"{t['samples']:,}",
                    _share(t["right"]),
                    _share(t["positions_right"]),
                    _share(t["converged"]),
                    f"{t['mean_steps']:.1f}",
                )
            )
    return Table(
        "Trained here, every seed",
        (
            *(
                "model",
                "seed",
                "parameters",
                "updates",
                "size",
                "examples",
                "entirely right",
                "positions right",
            ),
            *("converged", "steps"),
        ),
        rows,
        (
            "ff: feed-forward; rnn: recurrent without recall, progressive training; deq: torchdeq, implicit "
            "gradient. Recipes: zoo/tasks/recipe.py.",
        ),
    )


def _seeds(cells: list[Record], model: str, size: int) -> list[float]:
    return [
        c["data"]["tested"][str(size)]["right"]
        for c in _done(cells, "retrained")
        if c["options"]["model"] == model and str(size) in c["data"]["tested"]
    ]


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _share(values[0])
    return f"{_share(statistics.median(values))} ({_share(min(values))} to {_share(max(values))})"


def claims(cells: list[Record]) -> list[Claim]:
    """Lines for the index page."""
    lines = []
    for cell in _done(cells, "shipped"):
        o, d = cell["options"], cell["data"]
        key = (o["task"], o["size"])
        if key not in _TARGETS and key not in _AIMS:
            continue
        target = _TARGETS.get(key)
        met = "not measured" if target is None else ("yes" if d["right"] >= target else "no")
        goals = ([f"at least {_share(target, 1)}"] if target else []) + (
            [f"aim {_AIMS[key]}"] if key in _AIMS else []
        )
        if target is None:
            met = "yes" if d["right"] >= float(_AIMS[key].rstrip(" %")) / 100 else "no"
        lines.append(
            Claim(
                f"{o['task'].replace('_', ' ')} of size {o['size']}, entirely right ({d['samples']:,})"
                + ("" if o.get("precision", "float32") == "float32" else f", {o['precision']}"),
                PUBLISHED.get(key, "none"),
                f"{_share(d['right'])}, {d['parameters'] / 1000:.0f} k parameters",
                f"{_share(d['converged'])} converged, {d['mean_steps']:.0f} steps",
                ", ".join(goals),
                met,
            )
        )
    lines += _rank_claims(cells)
    return lines + _seed_claims(cells)


def _rank_claims(cells: list[Record]) -> list[Claim]:
    lines = []
    for cell in _done(cells, "shipped"):
        o, d = cell["options"], cell["data"]
        known = {k: v for k, v in d["rank_correlation"].items() if v is not None}
        if o["task"] != "mazes" or not known or d["samples"] < 20:
            continue
        best = known.get("dead_end", 0.0)
        lines.append(
            Claim(
                f"mazes of size {o['size']}: harder ones take longer",
                "none",
                ", ".join(f"{k} {v:.2f}" for k, v in known.items()),
                "rank correlation of steps",
                "above 0.8 with the distance information travels (dead_end)",
                "yes" if best > 0.8 else "no",
            )
        )
    return lines


def _seed_claims(cells: list[Record]) -> list[Claim]:
    lines = []
    for (trained, what), size in ((item, s) for item in _TRAINED.items() for s in (6, 9, 14)):
        ours = _seeds(cells, f"twnn_pathfinder/{trained}", size)
        nets = [_seeds(cells, f"ff_pathfinder/{trained}{more}", size) for more in ("", ", halved twice")]
        theirs = max((found for found in nets if found), key=statistics.median, default=[])
        if not (ours and theirs):
            continue
        ahead = 100 * (statistics.median(ours) - statistics.median(theirs))
        lines.append(
            Claim(
                f"Pathfinder at length {size}, trained on {what}, against the best feed-forward net",
                _spread(theirs),
                _spread(ours),
                f"{ahead:+.1f} points, {len(ours)} seed(s)",
                "5 points ahead at length 14",
                ("yes" if ahead >= 5 else "no") if size == 14 else "-",
            )
        )
    values = _seeds(cells, "twnn_prefix", 512)
    if len(values) > 1:
        good = sum(v >= 0.999 for v in values)
        lines.append(
            Claim(
                "prefix sums of 512 bits, seeds that get there",
                PUBLISHED["prefix_sums", 512],
                _spread(values),
                f"{good} of {len(values)} seeds",
                "all seeds at 99.9 %",
                "yes" if good == len(values) else "no",
            )
        )
    return lines
