"""Where a result comes from: code, versions, hardware, seeds, command; and where each of its cells does.

A run that is resumed keeps cells of other days and other commits, so that what is true of the run is not true
of all its cells: each has a stamp of its own.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twnn_plugin import kernels

from .bench import Settings

__all__ = ["code_of", "dates_of", "days_of", "inherited", "provenance", "stamp", "versions_of", "where_of"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchdeq", "timm", "numpy", "twnn-plugin")
COMMIT = "TWNN_COMMIT"
"""The environment variable that names the commit of a copy without a history."""
STAMPED = ("commit", "dirty", "python", *PACKAGES, "cpu", "gpu", "kernels")
"""What each cell says of itself, beside its date."""


def provenance(settings: Settings, command: str) -> dict[str, Any]:
    """JSON values that say how a result was made."""
    # A copy without a history of its own may lie in somebody's repository, whose commits say nothing of it.
    top = _git("rev-parse", "--show-toplevel")
    ours = bool(top) and Path(top).resolve() == ROOT
    return {
        "command": command,
        "date": _now(),
        "commit": (_git("rev-parse", "HEAD") if ours else os.environ.get(COMMIT, "")) or "unknown",
        # Results of this very run must not make the code look changed.
        "dirty": ours and bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "python": sys.version.split()[0],
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.describe(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "cuda": torch.version.cuda if settings.device == "cuda" else None,
        "settings": settings.as_json(),
    }


def stamp(run: dict[str, Any]) -> dict[str, Any]:
    """Where a cell that is measured now comes from: the code and machine of the run, the date of now."""
    return {"date": _now(), **{name: run[name] for name in STAMPED}}


def inherited(run: dict[str, Any] | None) -> dict[str, Any] | None:
    """The stamp of a cell that has none: that of the run in whose file it was found; None: unknown."""
    if run is None or not (isinstance(run.get("commit"), str) and isinstance(run.get("date"), str)):
        return None
    return {name: run.get(name) for name in ("date", *STAMPED)}


def code_of(run: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Commits of the cells, and of how many each, if there are several."""

    def named(origin: dict[str, Any] | None) -> str:
        if origin is None:
            return "unknown"
        return origin["commit"][:12] + (" with local changes" if origin["dirty"] else "")

    counts = Counter(named(origin) for origin in _origins(run, cells))
    if len(counts) == 1:
        return f"commit {next(iter(counts))}"
    *most, last = (str(count) for count in counts.values())
    return f"commits {', '.join(counts)} ({', '.join(most)} and {last} cells)"


def dates_of(run: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """When the cells were measured, from the first to the last."""
    dates = sorted({origin["date"] for origin in _origins(run, cells) if origin is not None})
    return " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "date unknown"


def days_of(run: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The same as days."""
    return " to ".join(dict.fromkeys(date[:10] for date in dates_of(run, cells).split(" to ")))


def versions_of(run: dict[str, Any], cells: Sequence[dict[str, Any]], *names: str) -> str:
    """Versions that the cells were measured with, all of them where they differ."""
    return ", ".join(f"{name} {_distinct(run, cells, name.lower())}" for name in names)


def where_of(run: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """The device that measured: GPU, or CPU and its threads."""
    if run["gpu"]:
        return _distinct(run, cells, "gpu")
    origins = [origin for origin in _origins(run, cells) if origin is not None]
    # Results from before there were any do not mention them.
    known = dict.fromkeys(origin["kernels"] for origin in origins if origin.get("kernels"))
    compiled = f", compiled kernels {' and '.join(known)}" if known else ""
    return f"{_distinct(run, cells, 'cpu')}, {run['threads']} thread(s){compiled}"


def _origins(run: dict[str, Any], cells: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Of each cell, the oldest first, those that nobody knows last; files of old say it of the run alone."""
    found = [cell.get("origin", run) for cell in cells] or [run]
    return sorted(found, key=lambda origin: (origin is None, origin and origin["date"]))


def _distinct(run: dict[str, Any], cells: Sequence[dict[str, Any]], name: str) -> str:
    values = (origin[name] for origin in _origins(run, cells) if origin is not None)
    return " and ".join(dict.fromkeys(map(str, values))) or "unknown"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
