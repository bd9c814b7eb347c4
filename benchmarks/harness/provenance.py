"""Where a result comes from: code, versions, hardware, seeds, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .bench import Settings

__all__ = ["provenance"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchdeq", "timm", "numpy", "twnn-plugin")


def provenance(settings: Settings, command: str) -> dict[str, Any]:
    """JSON values that say how a result was made."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        # Results of this very run must not make the code look changed.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "python": sys.version.split()[0],
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "cuda": torch.version.cuda if settings.device == "cuda" else None,
        "settings": settings.as_json(),
    }


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
