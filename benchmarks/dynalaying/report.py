"""From the cells of ``dynalay`` to its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from ..harness import Table
from ..training.report import Record, Runs, runs_of
from .tasks import TASKS
from .text import TEXTS, VARIANTS, TextTask

__all__ = ["TITLES", "spread", "tables", "tested", "values"]

PAPER = {"dynalay": "92 %, 87 s", "longer": "88 %, 120 s", "deq-implicit": "91 %, 600 min"}
"""Table 1 on CIFAR-10: test accuracy and backward pass."""

TITLES = {
    "dynalay": "DynaLay",
    "longer": "three-layer CNN, trained as long",
    "model0": "three-layer CNN, as many epochs",
    "deq-implicit": "torchdeq DEQ, implicit",
    "deq-phantom": "torchdeq DEQ, through the last steps",
    "deq-unrolled": "torchdeq DEQ, unrolled",
}


def values(runs: Runs, arm: str, pick: Callable[[Record], Any]) -> dict[int, float]:
    """One figure of every seed."""
    return {seed: float(pick(data)) for seed, data in runs.get(arm, {}).items()}


def spread(figures: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Mean and range."""
    known = [value for value in figures if not math.isnan(value)]
    if not known:
        return "-"
    middle = f"{mean(known):.{digits}f}{unit}"
    if len(known) == 1:
        return middle
    return f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def tested(data: Record) -> float:
    return data["test"]["agent"]["accuracy"] if isinstance(data["test"], dict) else data["test"]


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """Table 1, the policies, models 0 to 3, the prices, the LSTMs."""
    made = []
    for task in TASKS.values():
        runs = runs_of(cells, task.name)
        if runs:
            made.append(_table1(task.title, runs))
        if "dynalay" in runs:
            made += [_policies(task.title, runs["dynalay"]), _prices(task.title, runs["dynalay"])]
            made.append(_models(task.title, runs))
    return [*made, *(_texts(runs, text) for text in TEXTS.values() if (runs := runs_of(cells, text.name)))]


def _texts(runs: Runs, text: TextTask) -> Table:
    rows, measure = [], ""
    for variant in VARIANTS:
        found = list(runs.get(variant, {}).values())
        if not found:
            continue
        measure = found[0]["measure"]
        rows.append(
            (
                variant,
                spread([d["test"] for d in found]),
                spread([d["cost"] for d in found]),
                spread([100 * d["settled"] for d in found], 1),
                spread([1e3 * d["times"]["backward_s"] for d in found], 1),
                f"{found[0]['parameters']:,}",
            )
        )
    return Table(
        f"Figure 7: {text.title}",
        ("iterated", f"test {measure}", "multiply-adds", "settled, %", "backward, ms", "parameters"),
        rows,
        (
            "A three-layer LSTM; every sequence is iterated in these layers. Paper: best in the third "
            "(WikiText-2 and IMDB).",
        ),
    )


def _table1(title: str, runs: Runs) -> Table:
    rows = []
    for arm, name in TITLES.items():
        found = runs.get(arm, {})
        if not found:
            continue
        base = next((d["test"]["agent_run"]["open_loop"] for d in runs.get("dynalay", {}).values()), None)
        cost = {
            seed: 1 + d["test"]["agent_run"]["cost"]
            if arm == "dynalay"
            else d["forward"] / (base or d["forward"])
            for seed, d in found.items()
        }
        rows.append(
            (
                name,
                spread([tested(d) for d in found.values()]),
                spread(list(cost.values())),
                *(
                    spread([1e3 * d[times][f"{phase}_s"] for d in found.values() if times in d], 1)
                    for phase in ("backward", "forward")
                    for times in ("times", "dynalay_times")
                ),
                _training(arm, found),
                PAPER.get(arm, "-"),
            )
        )
    columns = (
        *("network", "test accuracy, %", "multiply-adds of an image"),
        *("backward, ms", "DynaLay's beside it", "forward, ms", "DynaLay's beside it"),
        *("training, 1e12 multiply-adds", "paper (CIFAR-10)"),
    )
    return Table(
        f"Table 1: {title}",
        columns,
        rows,
        (
            "Mean and range over seeds. Multiply-adds relative to DynaLay's pass with nothing iterated. "
            "Times of one update of 64 images in training: in DynaLay's own row with its agent's choices and "
            "the implicit adjoint; beside a DEQ as it is trained, half of the images iterated and "
            "differentiated through one to three evaluations, in turn with the DEQ. The training of DEQs is "
            "not counted in multiply-adds.",
        ),
    )


def _training(arm: str, found: dict[int, Record]) -> str:
    """Multiply-adds of the training, in 1e12; those of a DEQ's solves are not counted."""
    return "-" if arm.startswith("deq") else spread([d["training"] / 1e12 for d in found.values()])


def _policies(title: str, found: dict[int, Record]) -> Table:
    tests = [data["test"] for data in found.values()]
    best = [data["best_layer"] for data in found.values()]
    rows: list[tuple[str, ...]] = []

    def add(name: str, accuracies: Sequence[float], costs: Sequence[float]) -> None:
        rows.append((name, spread(accuracies), spread([1 + cost for cost in costs])))

    for place in range(len(tests[0]["layers"])):
        name = "never" if place == 0 else f"always layer {place}"
        add(name, *(([t["layers"][place][k] for t in tests]) for k in ("accuracy", "cost")))
    chosen = [t["layers"][place] for t, place in zip(tests, best, strict=True)]
    add("always the best layer on validation", *(([c[k] for c in chosen]) for k in ("accuracy", "cost")))
    add("always all layers, one sweep", *(([t["sweep"][k] for t in tests]) for k in ("accuracy", "cost")))
    for name, key in (
        ("agent within 1.3 times the multiply-adds", "frugal"),
        ("agent within 0.6 times those of always", "agent"),
        ("the same, run and counted", "agent_run"),
        ("random, equal cost", "random"),
        ("entropy, equal cost on validation", "entropy"),
        ("halting, at most that cost on validation", "halting"),
        ("oracle", "oracle"),
    ):
        add(name, *(([t[key][k] for t in tests]) for k in ("accuracy", "cost")))
    ranks = [t["agent"]["rank"] for t in tests]
    shares = [mean(t["agent"]["shares"][place] for t in tests) for place in range(len(tests[0]["layers"]))]
    return Table(
        f"Policies on one network: {title}",
        ("policy", "test accuracy, %", "multiply-adds"),
        rows,
        (
            f"Figure 3, shares of the agent's choices: NOP {shares[0]:.1%}, "
            + ", ".join(f"layer {i} {s:.1%}" for i, s in enumerate(shares[1:], start=1))
            + "; paper: NOP the most, layer 1 25 %, layer 2 20 %.",
            f"Rank correlation of an image's loss with nothing iterated and what the agent spends on it: "
            f"{spread(ranks)}.",
        ),
    )


def _prices(title: str, found: dict[int, Record]) -> Table:
    rows = []
    first = next(iter(found.values()))
    for place, entry in enumerate(first["betas"]):
        same = [data["betas"][place] for data in found.values()]
        shares = [mean(e["shares"][k] for e in same) for k in range(len(entry["shares"]))]
        rows.append(
            (
                f"{entry['beta']:g}",
                spread([e["accuracy"] for e in same]),
                spread([1 + e["cost"] for e in same]),
                *(f"{share:.1%}" for share in shares),
            )
        )
    layers = len(first["betas"][0]["shares"]) - 1
    return Table(
        f"Figure 5: agents by the price of cost, {title}, images that choose",
        ("beta", "accuracy, %", "multiply-adds", "NOP", *(f"layer {i + 1}" for i in range(layers))),
        rows,
    )


def _models(title: str, runs: Runs) -> Table:
    rows = []
    for number, arm in enumerate(("model0", "model1", "model2", "dynalay")):
        found = runs.get(arm, {})
        if found:
            cost = [1 + d["test"]["agent"]["cost"] if number else 1.0 for d in found.values()]
            rows.append((f"model {number}", spread([tested(d) for d in found.values()]), spread(cost)))
    for arm, name in (("dynalay", "with warm-up"), ("cold", "without warm-up (figure 4)")):
        found = runs.get(arm, {})
        if found:
            cost = [1 + d["test"]["agent"]["cost"] for d in found.values()]
            rows.append((name, spread([tested(d) for d in found.values()]), spread(cost)))
    return Table(f"Figures 6 and 4: {title}", ("network", "test accuracy, %", "multiply-adds"), rows)
