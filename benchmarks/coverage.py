"""``coverage``: how many of timm's architectures take a cross-stage wormhole, and why the others do not.

One cell for each of timm's model files: all its architectures are looked at on the meta device (shapes and
dataflow, no values), and the smallest of them is built for real, where a closed wormhole must leave the
output as it is, to the bit. See :mod:`benchmarks.covering.measure`.
"""

from __future__ import annotations

import gc
from collections import Counter
from statistics import median
from typing import Any

from .covering.measure import KINDS, architectures, classify, prove
from .covering.representatives import REPRESENTATIVES
from .harness import Benchmark, Cell, Claim, Settings, Table, register

__all__ = ["Coverage"]

QUICK = ("cspnet", "resnet", "visformer")
QUICK_EACH = 2
TO_REACH, FILES_TO_REACH = 1330, 98


class Coverage(Benchmark):
    """Every architecture, every model file."""

    name = "coverage"
    question = (
        "Which of timm's architectures take a wormhole from the last stage to the second, and which do not?"
    )
    cpu_only = "looks at dataflow, not at speed"
    one_seed = "draws its weights and images once"
    no_budget = "times nothing"

    def cells(self, settings: Settings) -> list[Cell]:
        found = architectures()
        files = [file for file in QUICK if file in found] if settings.quick else sorted(found)
        limit = QUICK_EACH if settings.quick else None
        return [
            Cell(file, {"architectures": len(found[file][:limit]), "seed": settings.seeds[0]})
            for file in files
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        names = architectures()[cell.key][: cell.options["architectures"]]
        kinds: Counter[str] = Counter()
        exceptions = []
        autos = 0
        for place, name in enumerate(names):
            found = classify(name)
            kinds[found["kind"]] += 1
            autos += bool(found.get("auto"))
            if found["kind"] != "rule":
                exceptions.append({"name": name, **found})
            if place % 16 == 15:
                gc.collect()  # modules refer to each other
        proved = REPRESENTATIVES.get(cell.key, names[0])
        return {
            "kinds": dict(kinds),
            "auto": autos,
            "exceptions": exceptions,
            "representative": {"name": proved, **prove(proved, cell.options["seed"])},
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [_summary(cells), _exceptions(cells), _files(cells)]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        done = _done(cells)
        kinds, total = _kinds(done), _total(cells)
        files = sum(_accepted(cell) for cell in done)
        same = sum(cell["data"]["representative"]["identical"] for cell in done)
        moved = sorted(cell["data"]["representative"]["moved"] for cell in done)
        settled = sum(cell["data"]["representative"]["settled"] for cell in done)
        return [
            Claim(
                "a wormhole from the last stage's output to the second stage's input, by the general rule",
                "none",
                f"{kinds['rule']} of {total} architectures",
                f"{100 * kinds['rule'] / max(total, 1):.1f} %",
                f"at least {TO_REACH}",
                "yes" if kinds["rule"] >= TO_REACH else "no",
            ),
            Claim(
                "the same with the fallback, on one architecture of every model file, run for real",
                "none",
                f"{files} of {len(cells)} files",
                f"{100 * files / max(len(cells), 1):.1f} %",
                f"all {FILES_TO_REACH}",
                "yes" if files == len(cells) >= FILES_TO_REACH else "no",
            ),
            Claim(
                "closed gate: the output is the plain network's to the bit",
                "none",
                f"{same} of {len(done)} representatives",
                "-",
                "all",
                "yes" if same == len(cells) else "no",
            ),
            Claim(
                "open by a message of scale 0.01: samples settle, and the output moves by a little",
                "none",
                f"{settled} of {len(done)} representatives settle",
                f"by {100 * median(moved):.2g} %, at most {100 * moved[-1]:.2g} %" if moved else "-",
                "small",
                "reported",
            ),
        ]


def _done(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["status"] == "ok"]


def _total(cells: list[dict[str, Any]]) -> int:
    return sum(cell["options"]["architectures"] for cell in cells)


def _kinds(cells: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(cell["data"]["kinds"]) for cell in cells), Counter())


def _accepted(cell: dict[str, Any]) -> bool:
    proved = cell["data"]["representative"]
    return proved["identical"] and proved["keys"] and proved["finite"]


def _summary(cells: list[dict[str, Any]]) -> Table:
    done = _done(cells)
    kinds, total = _kinds(done), _total(cells)
    rows = []
    for kind in KINDS:
        files = sum(kind in cell["data"]["kinds"] for cell in done)
        rows.append((kind, str(kinds[kind]), f"{100 * kinds[kind] / max(total, 1):.1f} %", str(files)))
    reruns = sum(e["fallback"] for cell in done for e in cell["data"]["exceptions"])
    auto = sum(cell["data"]["auto"] for cell in done)
    return Table(
        "From the second stage's input to the last stage's output",
        ("accepted by", "architectures", "share", "files"),
        rows,
        (
            f"{total} architectures in {len(cells)} files, on the meta device. The fallback has the whole "
            f"span on {reruns} of those that are not accepted by rule. wormholes='auto' finds a span by rule "
            f"on {auto}.",
        ),
    )


def _exceptions(cells: list[dict[str, Any]]) -> Table:
    grouped: dict[tuple[str, ...], list[str]] = {}
    for cell in _done(cells):
        for e in cell["data"]["exceptions"]:
            key = (cell["key"], e["kind"], "yes" if e["fallback"] else "no", e["reason"].split(" (")[0])
            grouped.setdefault(key, []).append(e["name"])
    rows = [
        (file, ", ".join(names), kind, fallback, reason)
        for (file, kind, fallback, reason), names in grouped.items()
    ]
    return Table("Exceptions", ("file", "architectures", "kind", "fallback", "reason"), rows, long=True)


def _files(cells: list[dict[str, Any]]) -> Table:
    rows = []
    for cell in _done(cells):
        proved = cell["data"]["representative"]
        counts = cell["data"]["kinds"]
        rows.append(
            (
                cell["key"],
                str(cell["options"]["architectures"]),
                ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts.get(kind)),
                proved["name"],
                proved["span"],
                proved["mode"],
                "yes" if proved["identical"] else "no",
                f"{100 * proved['moved']:.2g} %",
                "yes" if proved["settled"] else "no",
            )
        )
    columns = (
        "file",
        "architectures",
        "accepted by",
        "run for real",
        "span",
        "mode",
        "closed is plain",
        "opened a little",
        "settled",
    )
    return Table("Model files", columns, rows, long=True)


register(Coverage())
