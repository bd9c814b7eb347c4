"""What recorded step counts cost over many processes that wait for each other at every update.

Time is counted in replays of the span. An update of one process takes, for the b rows of its batch with steps
``s``:

- ``"rows"``: ``outside + mean(s)``, where each row is paid for (a device that is full);
- ``"launches"``: ``outside + max(s)``, where an evaluation costs the same for few rows as for many.

``outside`` is the open-loop pass, in replays, by multiply-adds. The update is over when the slowest process
is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["COSTS", "PLANS", "PREDICTORS", "Population", "Setting", "simulate"]

COSTS = ("rows", "launches")
PREDICTORS = ("none", "gate", "previous epoch", "oracle")
PLANS = ("as they come", "dealt", "bucketed", "bucketed and dealt")
BUCKETS = 64
"""Updates that the bucketed plans put in order of the forecast before they are shuffled."""

Steps = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Samples to draw from: their steps, and forecasts of them by the predictor's name, (N,) each."""

    steps: Steps
    forecast: dict[str, Steps]
    outside: float

    @staticmethod
    def of(record: dict[str, list[float]], outside: float, cap: int | None = None) -> Population:
        """From a recorded cell; ``cap``: no sample takes more steps."""
        steps = np.asarray(record["steps"], dtype=np.float64)
        steps = steps if cap is None else np.minimum(steps, cap)
        forecast = {
            "none": np.zeros_like(steps),
            "gate": np.asarray(record["score"], dtype=np.float64),
            "previous epoch": np.asarray(record["before"], dtype=np.float64),
            "oracle": steps,
        }
        return Population(steps, forecast, outside)


@dataclass(frozen=True)
class Setting:
    """One training set-up.

    Attributes:
        ranks: processes.
        batch: rows of each.
        cost: see the module.
        plan: who gets which rows. ``"as they come"``: anyhow. ``"dealt"``: the rows of an update are dealt
            in the order of the forecast, to and fro, so that the processes get equal work. ``"bucketed"``:
            the rows of many updates are put in the order of the forecast and cut into updates of like rows.
        predictor: whose forecast.
    """

    ranks: int
    batch: int
    cost: str
    plan: str = "as they come"
    predictor: str = "none"


def simulate(
    population: Population, setting: Setting, updates: int, random: np.random.Generator
) -> dict[str, float]:
    """Mean time of an update, of the mean process in it, and the share of time lost to waiting.

    Args:
        population: drawn from with replacement.
        setting: the set-up.
        updates: how many, a multiple of :data:`BUCKETS` or fewer than that.
        random: draws.
    """
    slowest, mean = [], []
    window = min(updates, BUCKETS)
    for _ in range(max(1, updates // window)):
        rows = random.integers(len(population.steps), size=(window, setting.ranks * setting.batch))
        forecast = population.forecast[setting.predictor]
        if setting.plan.startswith("bucketed"):
            rows = _shuffled(rows.reshape(-1), forecast, random).reshape(rows.shape)
            rows = random.permuted(rows, axis=1)
        for update in rows:
            times = _times(population, setting, _dealt(update, setting, forecast))
            slowest.append(float(times.max()))
            mean.append(float(times.mean()))
    return {
        "time": float(np.mean(slowest)),
        "busy": float(np.mean(mean)),
        "lost": 1 - float(np.sum(mean)) / float(np.sum(slowest)),
    }


def _shuffled(rows: NDArray[np.int64], forecast: Steps, random: np.random.Generator) -> NDArray[np.int64]:
    """In the order of the forecast, ties in random order."""
    return rows[np.lexsort((random.random(rows.size), forecast[rows]))]


def _dealt(update: NDArray[np.int64], setting: Setting, forecast: Steps) -> NDArray[np.int64]:
    """(ranks, batch) rows."""
    if not setting.plan.endswith("dealt"):
        return update.reshape(setting.ranks, setting.batch)
    ordered = update[np.argsort(-forecast[update], kind="stable")].reshape(setting.batch, setting.ranks)
    ordered[1::2] = ordered[1::2, ::-1]
    return ordered.T


def _times(population: Population, setting: Setting, rows: NDArray[np.int64]) -> Steps:
    """(ranks,) time of each process."""
    steps = population.steps[rows]
    work: Callable[..., Steps] = np.mean if setting.cost == "rows" else np.max
    return population.outside + work(steps, axis=1)
