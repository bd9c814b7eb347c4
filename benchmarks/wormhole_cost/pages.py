"""Tables, plots and claims of ``overhead``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..harness import Claim, Table
from ..solving.pictures import COLOURS, save

__all__ = ["CLOSED_TARGET", "OPEN_TARGET", "claims", "closed", "opened", "plot"]

CLOSED_TARGET = 0.03
OPEN_TARGET = 0.05


def _good(cells: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["status"] == "ok" and cell["options"]["kind"] == kind]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _spread(spread: dict[str, float]) -> str:
    return f"{_percent(spread['median'])} ({_percent(spread['q1'])} to {_percent(spread['q3'])})"


def _more(data: dict[str, Any], what: str) -> int:
    return data[what]["closed"] - data[what]["plain"]


def closed(cells: list[dict[str, Any]]) -> Table:
    """Closed wormholes."""
    rows = []
    for cell in _good(cells, "closed"):
        data, seconds = cell["data"], cell["data"]["seconds"]
        rows.append(
            (
                cell["key"].removeprefix("closed/"),
                f"{1e3 * seconds['plain']['median']:.2f}",
                f"{1e3 * seconds['closed']['median']:.2f}",
                _spread(data["ratios"]["closed"]),
                _spread(data["ratios"]["twin"]),
                f"{data['operations']['plain']} + {_more(data, 'operations')}",
                str(_more(data, "waits")),
                "yes" if data["same_bits"] else "NO",
                str(seconds["plain"]["n"]),
            )
        )
    columns = (
        *("model", "plain, ms", "closed, ms", "overhead", "plain again"),
        *("operations", "waits", "same bits", "rounds"),
    )
    notes = (
        "Ratios round by round; median and quartiles. The models share their weights. Plain again: another "
        "plain model in the same rounds, whose difference is chance.",
        "Operations: those of the plain pass, and how many more there are; waits: how often the closed "
        "wormhole has the host wait for a value.",
    )
    return Table("Closed wormhole against the plain forward", columns, rows, notes)


def opened(cells: list[dict[str, Any]]) -> Table:
    """Open wormholes."""
    rows = []
    for cell in _good(cells, "open"):
        data, seconds = cell["data"], cell["data"]["seconds"]
        rows.append(
            (
                cell["key"].removeprefix("open/"),
                data["span"],
                f"{1e3 * seconds['modules']['median']:.2f}",
                _spread(data["ratios"]["replay"]),
                _spread(data["ratios"]["evaluation"]),
                f"{data['reported']:,.0f}",
                f"{data['counted']:,}",
            )
        )
    columns = ("model", "span", "modules, ms", "replay", "with the message", "reported", "counted")
    notes = ("Reported, counted: multiply-adds of one evaluation for one row, the message included.",)
    return Table("A replay against the modules of the span", columns, rows, notes)


def plot(cells: list[dict[str, Any]], path: Path) -> Path:
    """Overheads with their quartiles, and the targets."""
    kinds = (("closed", "closed", CLOSED_TARGET), ("open", "replay", OPEN_TARGET))
    count = max(len(_good(cells, kind)) for kind, _, _ in kinds)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.32 * max(count, 4) + 1.2))
    for axis, (kind, name, target) in zip(axes, kinds, strict=True):
        mine = _good(cells, kind)
        for place, cell in enumerate(mine):
            low, middle, high = (100 * (cell["data"]["ratios"][name][q] - 1) for q in ("q1", "median", "q3"))
            axis.errorbar(
                middle,
                place,
                xerr=[[middle - low], [high - middle]],
                fmt="o",
                color=COLOURS["ours"],
                capsize=2,
            )
        axis.axvline(100 * target, color="#c00000", lw=1.5)
        axis.axvline(0, color="black", lw=0.6, ls=":")
        axis.set_yticks(range(len(mine)), [cell["key"].partition("/")[2] for cell in mine], fontsize=7)
        axis.set_ylim(len(mine) - 0.5, -0.5)
        axis.set_title(
            "closed, against the plain forward" if kind == "closed" else "one replay, against its span"
        )
        axis.set_xlabel("%, median and quartiles (red: target)", fontsize=8)
    figure.tight_layout()
    return save(figure, path)


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """The worst cell of each kind, and whether the counts agree."""
    made = []
    for kind, name, target, words in (
        ("closed", "closed", CLOSED_TARGET, "closed wormhole in eval mode"),
        ("open", "replay", OPEN_TARGET, "one replay against its span's modules"),
    ):
        mine = _good(cells, kind)
        if not mine:
            continue
        worst = max(mine, key=lambda cell: cell["data"]["ratios"][name]["median"])
        spread = worst["data"]["ratios"][name]
        met = sum(cell["data"]["ratios"][name]["median"] <= 1 + target for cell in mine)
        made.append(
            Claim(
                f"{words}, worst of {len(mine)}: {worst['key']}",
                "plain forward" if kind == "closed" else "the modules called one by one",
                _percent(spread["median"]),
                _spread(spread),
                f"at most {100 * target:.0f} %",
                "yes" if met == len(mine) else f"in part ({met} of {len(mine)})" if met else "no",
            )
        )
    mine = _good(cells, "closed")
    if mine:
        most = max(_more(cell["data"], "operations") for cell in mine)
        waits = max(_more(cell["data"], "waits") for cell in mine)
        words = "operations of a closed wormhole; times that the host waits"
        made.append(
            Claim(words, "plain forward", f"{most}; {waits}", "", "one wait", "yes" if waits <= 1 else "no")
        )
    same = [cell["data"]["same_bits"] for cell in _good(cells, "closed")]
    counts = [round(c["data"]["reported"]) == c["data"]["counted"] for c in _good(cells, "open")]
    for words, found in (
        ("closed logits are the plain model's bits", same),
        ("multiply-adds as counted", counts),
    ):
        if found:
            met = "yes" if all(found) else "no"
            made.append(Claim(words, "", f"{sum(found)} of {len(found)}", "", "all", met))
    return made
