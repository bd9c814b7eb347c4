"""The contestants, of equal size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.models.sequence import SequenceModel

from .tasks import Task

__all__ = ["CONTESTANTS", "build", "parameters", "reach", "sized"]

SOLVE = {"tol": 1e-2, "max_iter": 20, "solver": "anderson", "adjoint": "implicit"}


def reach(length: int) -> int:
    """How far back in time the skipping wormhole reads.

    The root of the length: from one end to the other there are then about as many hops as there are steps
    within one hop, and their sum is the smallest.
    """
    return max(1, round(math.sqrt(length)))


def _skip(far: int) -> dict[str, Any]:
    # Nothing within a window of so many steps depends on itself: solved exactly, one window after another.
    return {"wormholes": f"layer0[t-{far}]->layer0", "window": far, "gate": "always", "gate_over": "state"}


CONTESTANTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "GRU": lambda length: {"cell": "gru"},
    "LSTM": lambda length: {"cell": "lstm"},
    "GRU, wormhole through time": lambda length: {"cell": "gru", **_skip(reach(length))},
    "GRU, wormhole of the copy's lag": lambda length: {"cell": "gru", **_skip(length - 10)},
    "GRU, wormhole from the end": lambda length: {
        "cell": "gru",
        "wormholes": "layer0[end]->layer0",
        "gate": "always",
        **SOLVE,
    },
    "GRU, wormhole within the step": lambda length: {
        "cell": "gru",
        "wormholes": "layer0->layer0",
        "gate": "always",
        **SOLVE,
    },
}
"""Options of :class:`SequenceModel` by name, as functions of the length."""


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for p in model.parameters())


def build(name: str, task: Task, hidden: int) -> SequenceModel:
    """A contestant of one width."""
    return SequenceModel(hidden=hidden, **task.model, **CONTESTANTS[name](task.length))


def sized(name: str, task: Task, hidden: int) -> SequenceModel:
    """A contestant with as many parameters as the GRU of width ``hidden``, or a few less."""
    with torch.random.fork_rng(devices=[]):
        wanted = parameters(build("GRU", task, hidden))
        width = hidden
        while width > 1 and parameters(build(name, task, width)) > wanted:
            width -= 1
    return build(name, task, width)
