"""What ``twnn list`` shows."""

from __future__ import annotations

import inspect

import timm

import twnn_plugin as tw

__all__ = ["rows"]


def rows(kind: str) -> list[tuple[str, str, str]]:
    """(name, owner, one line) of everything of ``kind``: ``"models"``, ``"solvers"``, ``"gates"``, ..."""
    if kind == "models":
        found = (_model_row(name) for name in timm.list_models())
        return [row for row in found if not row[1].startswith("timm.")]  # ours, and those of plugins
    registry = getattr(tw, kind)
    return [(entry.name, entry.owner, entry.summary) for entry in registry.entries()]


def _model_row(name: str) -> tuple[str, str, str]:
    entry = timm.model_entrypoint(name)
    doc = (inspect.getdoc(entry) or "").strip().splitlines()
    return name, entry.__module__, doc[0] if doc else ""
