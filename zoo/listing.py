"""What ``twnn list`` shows."""

from __future__ import annotations

import inspect

import timm

import twnn_plugin as tw

__all__ = ["MODEL_PATTERNS", "rows"]

MODEL_PATTERNS = (
    *("twnn_*", "dynalay_*", "deq_*", "hamiltonian_*", "cnn3", "lstm3", "gru3", "resnet*_cifar"),
    *("ff_*", "rnn_*"),
)


def rows(kind: str) -> list[tuple[str, str, str]]:
    """(name, owner, one line) of everything of ``kind``: ``"models"``, ``"solvers"``, ``"gates"``, ..."""
    if kind == "models":
        return [_model_row(name) for name in timm.list_models(list(MODEL_PATTERNS))]
    registry = getattr(tw, kind)
    return [(entry.name, entry.owner, entry.summary) for entry in registry.entries()]


def _model_row(name: str) -> tuple[str, str, str]:
    entry = timm.model_entrypoint(name)
    doc = (inspect.getdoc(entry) or "").strip().splitlines()
    return name, entry.__module__, doc[0] if doc else ""
