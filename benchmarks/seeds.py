"""The seed papers' tables and figures, each a row beside what the benchmarks measured.

What the papers say is data here, with the place where they say it; what was measured is read from the result
files, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ROWS", "SeedRow", "section"]

_TWNN = "Habiba & Pearlmutter (2021)"
_DYNALAY = "Mathur & Plis (2023)"
_POSTER = "Gonzalez & Mang (2018)"
NOT_YET = "not yet measured"


@dataclass(frozen=True)
class SeedRow:
    """One table or figure of a seed paper.

    Attributes:
        paper: whose.
        place: which table or figure.
        shows: what it shows.
        said: the paper's figures or words.
        benchmark: whose results answer it.
        data: the paper's data; None: no data set, the experiment is given in full.
        match: what the text of a claim that answers it contains.
    """

    paper: str
    place: str
    shows: str
    said: str
    benchmark: str
    data: str | None
    match: str


ROWS = (
    SeedRow(
        _TWNN,
        "table 3",
        "accuracy of TWNN beside ResNets",
        "ResNet-36 88.25 %, ResNet-50 90.63 %, TWNN 96.54 %",
        "models",
        "cifar10",
        "TWNN, table 3",
    ),
    SeedRow(
        _TWNN,
        "figure 7",
        "a sine wave learnt through fix",
        "gradients and loss settle within 300 iterations; no figure",
        "sequences",
        None,
        "Sine wave",
    ),
    SeedRow(
        _DYNALAY,
        "table 1",
        "accuracy and time of the backward pass",
        "CIFAR-10: DynaLay 92 %, 87 s; three-layer CNN 88 %, 120 s; DEQ 91 %, 600 min. "
        "CIFAR-100: DynaLay 85 %, 90 s; CNN 82 %, 140 s",
        "models",
        "cifar10",
        "DynaLay, table 1",
    ),
    SeedRow(
        _DYNALAY,
        "figure 2",
        "loss of training and test by epoch",
        "converges alike on CIFAR-10 and CIFAR-100",
        "dynalay",
        "cifar10",
        "figure 2",
    ),
    SeedRow(
        _DYNALAY,
        "figure 3",
        "how often each layer is chosen",
        "no layer most often, layer 1 25 %, layer 2 20 %, layer 3 least",
        "dynalay",
        "cifar10",
        "figure 3",
    ),
    SeedRow(
        _DYNALAY,
        "figure 4",
        "with pre-training and without",
        "pre-trained is ahead in accuracy and loss throughout",
        "dynalay",
        "cifar10",
        "figure 4",
    ),
    SeedRow(
        _DYNALAY,
        "figure 5",
        "reward by epoch; choices by penalty",
        "the reward settles; a higher penalty means cheaper choices",
        "dynalay",
        "cifar10",
        "figure 5",
    ),
    SeedRow(
        _DYNALAY,
        "figure 6",
        "fixed-point iteration in no layer, 1, 1 and 2, all",
        "the more layers, the better; 100 test images",
        "dynalay",
        "cifar10",
        "figure 6",
    ),
    SeedRow(
        _DYNALAY,
        "figure 7",
        "the same in an LSTM on text",
        "best with iteration in layer 3",
        "dynalay",
        "wikitext2",
        "figure 7",
    ),
    SeedRow(
        _POSTER,
        "figure 2",
        "three features through 21 Euler layers",
        "K+ diverges, K- collapses, K0 and the antisymmetric ones keep distances",
        "propagation",
        None,
        "figure 2",
    ),
    SeedRow(
        _POSTER,
        "figure 3",
        "Verlet propagation up to 1000 layers",
        "features neither explode nor vanish",
        "propagation",
        None,
        "figure 3",
    ),
)
_VERDICTS = {
    frozenset({"yes"}): "holds",
    frozenset({"no"}): "does not hold",
    frozenset({"not measured"}): "not decided",
}


def section(results: Mapping[str, tuple[str, dict[str, Any]]]) -> str:
    """The section "Seed papers" of the index page.

    Args:
        results: newest result of each benchmark by its name, with the name of its folder.
    """
    lines = [
        "## Seed papers",
        "",
        "Each table and figure, the data that was used here, and whether it holds there. A figure that the "
        "paper took on other data is not reproduced, whatever holds here.",
        "",
        "| paper | place | what it shows | the paper's figure | data used here | ours | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_row(row, results)) + " |" for row in ROWS]
    return "\n".join([*lines, ""])


def _row(row: SeedRow, results: Mapping[str, tuple[str, dict[str, Any]]]) -> tuple[str, ...]:
    start = (row.paper, row.place, row.shows, row.said)
    if row.benchmark not in results:
        return (*start, "-", "-", NOT_YET)
    folder, result = results[row.benchmark]
    claims = [claim for claim in result["claims"] if row.match in claim["claim"]]
    if not claims:
        return (*start, "-", "-", NOT_YET)
    data = _data(result) if row.data is not None else "the paper's own setting"
    ours = "<br>".join(f"{claim['claim']}: {claim['ours']} ({claim['ratio']})" for claim in claims)
    link = f"[{row.benchmark}](results/{folder}/table.md)"
    return (*start, data, f"{ours}<br>{link}", _verdict(row, claims, data))


def _data(result: dict[str, Any]) -> str:
    """The data sets that the cells name, in order."""
    named = []
    for cell in result["cells"]:
        data, options = cell["data"] or {}, cell["options"]
        named.append(data.get("data") or options.get("dataset"))
    return "; ".join(dict.fromkeys(name for name in named if name)) or "not named"


def _verdict(row: SeedRow, claims: list[dict[str, Any]], data: str) -> str:
    """In a word whether it holds, and whether on the paper's data."""
    decided = frozenset(claim["met"] for claim in claims if claim["met"] != "-")
    holds = _VERDICTS.get(decided, "holds in part" if decided else "not decided")
    if row.data is not None and row.data not in data:
        return f"not reproduced: other data; on these: {holds}"
    return {"holds": "reproduced", "does not hold": "not reproduced"}.get(holds, f"not reproduced: {holds}")
