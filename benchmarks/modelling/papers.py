"""Which of the seed papers' claims about accuracy, time and memory hold on what was measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..harness import Claim, Table
from ..training.report import paired, shown

__all__ = ["CLAIMS", "PaperClaim", "judged", "paper_claims", "verdicts"]

Get = Callable[[dict[str, Any]], float]


def _accuracy(data: dict[str, Any]) -> float:
    return data["test"]["accuracy"]


def _backward(data: dict[str, Any]) -> float:
    return data["work"]["backward"]["median"]


def _update(data: dict[str, Any]) -> float:
    return data["work"]["total"]["median"]


def _memory(data: dict[str, Any]) -> float:
    return data["work"]["peak_bytes"] / 1e6


@dataclass(frozen=True)
class PaperClaim:
    """A claim of a paper that compares two networks.

    Attributes:
        said: in words.
        source: paper and place.
        figures: the paper's.
        arm: whom it is about.
        other: whom it is compared with.
        get: the figure that decides.
        unit: of it.
        higher: whether more is better.
        slack: how much worse still counts, in units, where the paper says "comparable".
        equally_trained: whether the figure depends on how long was trained.
    """

    said: str
    source: str
    figures: str
    arm: str
    other: str
    get: Get
    unit: str
    higher: bool
    slack: float = 0.0
    equally_trained: bool = False


_TWNN, _DYNALAY = "TWNN", "DynaLay"
CLAIMS = (
    PaperClaim(
        "TWNN is more accurate than ResNet-36",
        f"{_TWNN}, table 3, CIFAR-10",
        "96.54 against 88.25 %",
        "twnn",
        "resnet36",
        _accuracy,
        "%",
        True,
        equally_trained=True,
    ),
    PaperClaim(
        "TWNN is more accurate than ResNet-50",
        f"{_TWNN}, table 3, CIFAR-10",
        "96.54 against 90.63 %",
        "twnn",
        "resnet50",
        _accuracy,
        "%",
        True,
        equally_trained=True,
    ),
    PaperClaim(
        "TWNN is more accurate than its own backbone",
        f"{_TWNN}, section 5",
        "no figure",
        "twnn",
        "plain",
        _accuracy,
        "%",
        True,
    ),
    PaperClaim(
        "training TWNN takes no longer than training a ResNet",
        f"{_TWNN}, section 4.1",
        "no figure",
        "twnn",
        "plain",
        _update,
        "s an update",
        False,
    ),
    PaperClaim(
        "TWNN needs less memory than a deep network",
        f"{_TWNN}, sections 4.1 and 4.3",
        "no figure",
        "twnn",
        "resnet50",
        _memory,
        "MB",
        False,
    ),
    PaperClaim(
        "DynaLay is more accurate than the three-layer CNN",
        f"{_DYNALAY}, table 1, CIFAR-10",
        "92 against 88 %",
        "dynalay",
        "cnn3",
        _accuracy,
        "%",
        True,
    ),
    PaperClaim(
        "DynaLay's backward pass is faster than the three-layer CNN's",
        f"{_DYNALAY}, table 1, CIFAR-10",
        "87 against 120 s",
        "dynalay",
        "cnn3",
        _backward,
        "s an update",
        False,
    ),
    PaperClaim(
        "DynaLay's backward pass is faster than the DEQ's",
        f"{_DYNALAY}, table 1, CIFAR-10",
        "87 s against 600 min",
        "dynalay",
        "deq",
        _backward,
        "s an update",
        False,
    ),
    PaperClaim(
        "DynaLay is as accurate as the DEQ",
        f"{_DYNALAY}, table 1, CIFAR-10",
        "92 against 91 %",
        "dynalay",
        "deq",
        _accuracy,
        "%",
        True,
        slack=0.5,
    ),
)


def judged(claim: PaperClaim, found: dict[str, dict[int, dict[str, Any]]]) -> tuple[str, str, str, str]:
    """(ours, the other, verdict in one plain sentence, met as in a :class:`Claim`)."""
    ours, theirs = found.get(claim.arm, {}), found.get(claim.other, {})
    mine, others = ({seed: claim.get(d) for seed, d in side.items()} for side in (ours, theirs))
    gaps = paired(mine, others)
    if not gaps:
        return "-", "-", "Not measured.", "not measured"
    better = [(gap if claim.higher else -gap) + claim.slack > 0 for gap in gaps]
    digits = 2 if claim.unit in ("%", "MB") else 4
    one, other = (f"{shown(list(side.values()), digits)} {claim.unit}" for side in (mine, others))
    if claim.equally_trained and min(d["share"] for d in theirs.values()) < 1:
        updates = next(iter(theirs.values()))["training"]["updates"]
        sentence = f"Not decided here: the deep network got {updates} updates alone."
        return one, other, sentence, "not measured"
    if all(better):
        return one, other, f"Holds here on {_seeds(len(better))}.", "yes"
    if not any(better):
        return one, other, f"Does not hold here on {_seeds(len(better))}.", "no"
    return one, other, f"Holds here on {sum(better)} of {len(better)} seeds.", "in part"


def _seeds(count: int) -> str:
    return "the one seed" if count == 1 else f"all {count} seeds"


def paper_claims(found: dict[str, dict[int, dict[str, Any]]], where: str) -> list[Claim]:
    """A line for the index page for each claim whose networks were trained."""
    made = []
    for claim in CLAIMS:
        if claim.arm in found and claim.other in found:
            ours, theirs, verdict, met = judged(claim, found)
            text = f"{claim.source}: {claim.said} ({claim.figures}); on {where}"
            made.append(Claim(text, theirs, ours, verdict, "as the paper says", met))
    return made


def verdicts(found: dict[str, dict[int, dict[str, Any]]], title: str) -> Table:
    """Each claim beside what was measured."""
    rows = []
    for claim in CLAIMS:
        ours, theirs, verdict, _ = judged(claim, found)
        rows.append((claim.said, claim.source, claim.figures, ours, theirs, verdict))
    columns = ("the paper's claim", "where", "its figures", "ours", "the other", "does it hold?")
    return Table(f"The papers' claims: {title}", columns, rows)
