"""From the cells of ``dynalay`` to its claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

from ..harness import Claim
from ..training.report import Record, Runs, paired, runs_of
from .report import TITLES, spread, tested, values
from .tasks import TASKS
from .text import TEXTS, VARIANTS

__all__ = ["claims"]


def claims(cells: list[dict[str, Any]]) -> list[Claim]:
    """What was to be reached, and what was."""
    found = []
    for task in TASKS.values():
        runs = runs_of(cells, task.name)
        if "dynalay" in runs:
            found += _claims(task.title, runs)
    return found + [_text(text.title, runs) for text in TEXTS.values() if (runs := runs_of(cells, text.name))]


def _text(title: str, runs: Runs) -> Claim:
    """Figure 7."""
    measure = next(iter(next(iter(runs.values())).values()))["measure"]
    better = max if measure == "accuracy" else min
    figures = {name: values(runs, name, tested) for name in VARIANTS if name in runs}
    means = {name: mean(found.values()) for name, found in figures.items()}
    best = better(means, key=lambda name: means[name])
    gain = paired(figures.get("layer3", {}), figures.get("none", {}))
    return Claim(
        f"figure 7, LSTM, {title}: iterating which layer is best",
        "the third",
        ", ".join(f"{name} {value:.2f}" for name, value in means.items()) + f" ({measure})",
        f"best {best}; the third against none {spread(gain)}",
        "the third",
        ("yes" if best == "layer3" else "no") if len(means) == len(VARIANTS) else "not measured",
    )


def _claims(title: str, runs: Runs) -> list[Claim]:
    mine = runs["dynalay"]

    def of(pick: Callable[[Record], Any]) -> dict[int, float]:
        return values(runs, "dynalay", pick)

    agent = of(lambda d: d["test"]["agent"]["accuracy"])
    cost = of(lambda d: 1 + d["test"]["agent_run"]["cost"])
    always = of(lambda d: d["test"]["layers"][d["best_layer"]]["accuracy"])
    always_cost = of(lambda d: 1 + d["test"]["layers"][d["best_layer"]]["cost"])
    oracle = of(lambda d: d["test"]["oracle"]["accuracy"])
    made = [
        _against(title, "random at equal cost", agent, of(lambda d: d["test"]["random"]["accuracy"]), 0.5),
        _against(title, "the entropy threshold", agent, of(lambda d: d["test"]["entropy"]["accuracy"]), -0.2),
        _against(title, "halting", agent, of(lambda d: d["test"]["halting"]["accuracy"]), 0.0),
    ]
    way = mean(agent[s] - always[s] for s in mine), mean(oracle[s] - always[s] for s in mine)
    share = way[0] / way[1] if way[1] > 0 else math.nan
    made.append(
        Claim(
            f"agent: on the way from iterating always to the oracle, {title}",
            f"{way[1]:.2f} points",
            f"{way[0]:.2f} points",
            f"{share:.0%} of the way",
            "a quarter",
            "yes" if share >= 0.25 else "no",
        )
    )
    rel = [cost[s] / always_cost[s] for s in mine]
    gap = paired(agent, always)
    made.append(
        Claim(
            f"agent: DynaLay against iterating always, {title}",
            f"{spread(list(always.values()))} %",
            f"{spread(list(agent.values()))} %",
            f"{spread(gap)} points at {spread(rel)} of the cost",
            "-0.2 points at 0.6",
            "yes" if mean(gap) >= -0.2 and mean(rel) <= 0.6 else "no",
        )
    )
    made += _table1(title, runs)
    made += [
        _nop(title, mine),
        _monotone(title, mine),
        _hard(title, mine),
        _loss(title, runs),
        _reward(title, mine),
    ]
    made += _compared(title, runs, agent)
    return [*made, *_faster(title, runs, agent)]


def _table1(title: str, runs: Runs) -> list[Claim]:
    """Table 1: the frugal agent's accuracy beside the three-layer CNN's, trained as long."""
    plain = values(runs, "longer", tested)
    frugal = values(runs, "dynalay", lambda d: d["test"]["frugal"]["accuracy"])
    spent = values(runs, "dynalay", lambda d: 1 + d["test"]["frugal"]["cost"])
    ahead = paired(frugal, plain)
    if not ahead:
        return []
    met = mean(ahead) >= 1.0 and mean(spent.values()) <= 1.3
    return [
        Claim(
            f"table 1, accuracy, {title}: DynaLay against the three-layer CNN trained as long",
            f"{spread(list(plain.values()))} %",
            f"{spread(list(frugal.values()))} %",
            f"{spread(ahead)} points at {spread(list(spent.values()))} times its multiply-adds",
            "1 point at 1.3",
            "yes" if met else "no",
        )
    ]


def _against(title: str, name: str, agent: dict[int, float], other: dict[int, float], margin: float) -> Claim:
    gaps = paired(agent, other)
    return Claim(
        f"agent: against {name}, {title}",
        f"{spread(list(other.values()))} %",
        f"{spread(list(agent.values()))} %",
        f"{spread(gaps)} points",
        f"{margin:+g} points",
        "yes" if mean(gaps) >= margin else "no",
    )


def _nop(title: str, mine: dict[int, Record]) -> Claim:
    shares = [data["test"]["agent"]["shares"] for data in mine.values()]
    nop = [s[0] for s in shares]
    most = all(s[0] == max(s) and s[0] < 0.99 for s in shares)
    return Claim(
        f"figure 3, shares of the choices, {title}: NOP is the most frequent, without collapse",
        "NOP the most; layers 1 and 2 in 25 % and 20 %",
        f"NOP in {spread([100 * n for n in nop], 1)} %",
        "; ".join("/".join(f"{100 * x:.0f}" for x in s) + " %" for s in shares),
        "most, below 99 %",
        "yes" if most else "no",
    )


def _monotone(title: str, mine: dict[int, Record]) -> Claim:
    sweeps = [[point["shares"][0] for point in data["sweep"]] for data in mine.values()]
    betas = [[entry["shares"][0] for entry in data["betas"]] for data in mine.values()]
    swept = all(a <= b + 1e-9 for s in sweeps for a, b in pairwise(s))
    taught = all(a <= b + 0.01 for s in betas for a, b in pairwise(s))
    first = mine[min(mine)]["sweep"]
    return Claim(
        f"figure 5, shares against the price, {title}: NOP falls monotonically as the price falls",
        "falls (figure 5)",
        f"{100 * first[-1]['shares'][0]:.1f} % to {100 * first[0]['shares'][0]:.1f} %",
        f"one agent, price changed after training: {'in all' if swept else 'not in all'} seeds; agents "
        f"taught at "
        f"each price, within 1 point: {'in all' if taught else 'not in all'}",
        "monotone",
        "yes" if swept and taught else ("in part" if swept or taught else "no"),
    )


def _hard(title: str, mine: dict[int, Record]) -> Claim:
    ranks = [data["test"]["agent"]["rank"] for data in mine.values()]
    known = [rank for rank in ranks if not math.isnan(rank)]
    return Claim(
        f"agent: hard images get more compute than easy ones, {title}",
        "-",
        f"rank correlation {spread(ranks)}",
        "loss with nothing iterated against multiply-adds spent",
        "above 0",
        "yes" if known and len(known) == len(ranks) and min(known) > 0 else "no",
    )


def _loss(title: str, runs: Runs) -> Claim:
    curves = [data["curve"] for data in runs["dynalay"].values()]
    first, last = ([c[at]["loss"] for c in curves] for at in (0, -1))
    return Claim(
        f"figure 2, convergence of the loss, {title}",
        "training and test loss converge",
        f"validation loss {spread(first)} after the first epoch, {spread(last)} after the last",
        f"training loss {spread([c[-1]['train'] for c in curves])} at the end (both paths' together)",
        "falls",
        "yes" if all(b < a for a, b in zip(first, last, strict=True)) else "no",
    )


def _reward(title: str, mine: dict[int, Record]) -> Claim:
    taught = [data["betas"][data["chosen"]["agent"]]["reward"] for data in mine.values()]
    late = [abs(r[-1] - r[-max(2, len(r) // 4)]) for r in taught]
    whole = [abs(r[-1] - r[0]) for r in taught]
    return Claim(
        f"figure 5, reward while the agent is taught, {title}",
        "rises and stabilises",
        f"{spread([r[0] for r in taught], 4)} at first, {spread([r[-1] for r in taught], 4)} at last, over "
        f"NOP",
        f"last quarter moves it by {spread(late, 4)}, the whole by {spread(whole, 4)}",
        "rises, then moves less",
        "yes" if all(r[-1] > r[0] for r in taught) and mean(late) < 0.5 * mean(whole) else "no",
    )


def _compared(title: str, runs: Runs, agent: dict[int, float]) -> list[Claim]:
    """Figures 4 and 6: with and without warm-up; models 0 to 3."""
    made = []
    if "cold" in runs:
        cold = values(runs, "cold", tested)
        gaps = paired(agent, cold)
        if gaps:
            made.append(
                Claim(
                    f"figure 4, warm-up of the main model, {title}",
                    "with it better",
                    f"{spread(list(agent.values()))} % with, {spread(list(cold.values()))} % without",
                    f"{spread(gaps)} points",
                    "above 0, every seed",
                    ("yes" if min(gaps) > 0 else "in part") if mean(gaps) > 0 else "no",
                )
            )
    arms = ("model0", "model1", "model2", "dynalay")
    if all(arm in runs for arm in arms):
        each = [mean(values(runs, arm, tested).values()) for arm in arms]
        made.append(
            Claim(
                f"figure 6, fixed-point iteration in more layers, {title}",
                "model 3 expected best",
                ", ".join(f"model {i} {v:.2f} %" for i, v in enumerate(each)),
                f"model 3 against model 0 {each[3] - each[0]:+.2f} points",
                "model 3 best",
                "yes" if each[3] == max(each) else "no",
            )
        )
    return made


def _faster(title: str, runs: Runs, agent: dict[int, float]) -> list[Claim]:
    made = []
    for arm in ("deq-implicit", "deq-phantom", "deq-unrolled"):
        theirs = values(runs, arm, lambda d: d["times"]["backward_s"])
        ahead = paired(agent, values(runs, arm, tested))
        ways = {
            "as trained, side by side": {
                seed: data["dynalay_times"]["backward_s"]
                for seed, data in runs.get(arm, {}).items()
                if "dynalay_times" in data  # an older run may lack them
            },
            "its agent's choices and the implicit gradient": values(
                runs, "dynalay", lambda d: d["times"]["backward_s"]
            ),
        }
        for way, ours in ways.items():
            both = sorted(set(theirs) & set(ours))
            if not both:
                continue
            ratios = [theirs[s] / ours[s] for s in both]
            met, points = "not measured", "accuracy not measured with the same seed"
            if ahead:
                met = "yes" if min(ratios) >= 3 and mean(ahead) >= 0 else "no"
                points = f"accuracy {spread(ahead)} points ahead"
            made.append(
                Claim(
                    f"table 1, backward pass, {title}: against {TITLES[arm]}, {way}",
                    f"{spread([1e3 * theirs[s] for s in both], 1)} ms",
                    f"{spread([1e3 * ours[s] for s in both], 1)} ms",
                    f"{spread(ratios, 1)} times as fast, {points}",
                    "3 times, equal accuracy",
                    met,
                )
            )
    return made
