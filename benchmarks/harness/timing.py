"""Interleaved timing in one process, and its statistics.

Candidates run in rounds; each round visits all of them in a new random order, so that a slow spell of
the machine falls on all alike. Ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

__all__ = ["Laps", "Spread", "Stopwatch", "interleave", "ratio_of", "spread_of"]

_CHEAP_S = 0.05  # runs shorter than this cost little and vary much: they take part in every round

Laps = dict[str, float]
"""Seconds of each phase of one run, by the phase's name, and their sum as ``"total"``."""


class Stopwatch:
    """Times the phases of one run: CUDA events on CUDA, ``time.perf_counter`` elsewhere."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.names: list[str] = []
        self.marks: list[Any] = []

    def start(self) -> None:
        """Begin; work queued before is waited for first."""
        if self.cuda:
            torch.cuda.synchronize()
        self.names, self.marks = [], []
        self._mark()

    def lap(self, name: str) -> None:
        """End the phase ``name``; the next begins."""
        self.names.append(name)
        self._mark()

    def laps(self) -> Laps:
        """Seconds by phase, and ``"total"``."""
        if self.cuda:
            torch.cuda.synchronize()
            ends = zip(self.marks[:-1], self.marks[1:], strict=True)
            seconds = [a.elapsed_time(b) / 1e3 for a, b in ends]
        else:
            seconds = [b - a for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]
        return {**dict(zip(self.names, seconds, strict=True)), "total": sum(seconds)}

    def _mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, minimum and number of some measurements."""

    median: float
    q1: float
    q3: float
    min: float
    n: int

    def as_json(self) -> dict[str, float]:
        """The figures, by name, to four digits: more than timing can tell."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()} | {"n": self.n}


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of a non-empty sequence by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of a non-empty sequence."""
    return Spread(median(values), quantile(values, 0.25), quantile(values, 0.75), min(values), len(values))


def ratio_of(above: Sequence[float | None], below: Sequence[float | None]) -> Spread:
    """The spread of ``above / below``, round by round, over the rounds that have both."""
    both = [a / b for a, b in zip(above, below, strict=False) if a is not None and b is not None]
    return spread_of(both)


def interleave(
    candidates: Mapping[str, Callable[[Stopwatch], None]],
    *,
    device: str,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
    seed: int = 0,
    warmup: bool = True,
    slow_factor: float = 2.0,
    anchors: Collection[str] | None = None,
) -> dict[str, list[Laps | None]]:
    """Time candidates against each other.

    Args:
        candidates: by name, functions that do one run and call ``lap`` at the end of each phase.
        device: where they run.
        budget_s: no new round begins after this, once ``min_rounds`` are done.
        min_rounds: rounds in which every candidate takes part.
        max_rounds: rounds at most.
        seed: of the order within rounds.
        warmup: one untimed run of each first.
        slow_factor: candidates slower than this many times the fastest anchor take part in the first
            ``min_rounds`` alone, and those slower than twice as many in the first round alone:
            more rounds would tell nothing new and cost most of the time. Runs under 0.05 s always go on.
        anchors: names of the candidates that others are compared with; None: all.

    Returns:
        By name, one entry for each round: the seconds of its phases, or None where it did not run.
    """
    order = random.Random(seed)
    watch = Stopwatch(device)
    names = list(candidates)
    laps: dict[str, list[Laps | None]] = {name: [] for name in names}
    if warmup:
        for name in names:
            watch.start()
            candidates[name](watch)
            watch.laps()
    active, begin, done = set(names), time.perf_counter(), 0
    while done < max_rounds and (done < min_rounds or time.perf_counter() - begin < budget_s):
        gc.collect(1)
        order.shuffle(names)
        for name in names:
            if name not in active:
                laps[name].append(None)
                continue
            watch.start()
            candidates[name](watch)
            laps[name].append(watch.laps())
        done += 1
        if done in (1, min_rounds):
            middle = {name: median(lap["total"] for lap in laps[name] if lap) for name in names}
            fastest = min((middle[name] for name in anchors or names), default=0.0)
            limit = slow_factor * fastest * (1 if done == min_rounds else 2)
            active = {name for name in active if middle[name] <= max(limit, _CHEAP_S)}
    return laps
