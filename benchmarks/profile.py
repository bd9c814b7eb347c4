"""``profile``: where the time of the main models goes, as numbers: calls and shares of self time.

torch's profiler over a few passes after a warm-up. Shares, calls and operations are kept, traces are not.
Beside each model stands the newest committed run, so that a change shows as before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .harness import BenchError, Benchmark, Cell, Claim, Executed, Settings, Table, register
from .harness.provenance import code_of
from .harness.run import RESULTS, load
from .profiles.work import WORK

__all__ = ["Profile"]

PASSES, QUICK_PASSES = 10, 1
KEPT = 12
SIZES = {"cpu": (64, 14), "cuda": (256, 28)}
WAITS = ("aten::item", "aten::nonzero", "cudaStreamSynchronize")
LAUNCH = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


class Profile(Benchmark):
    """One cell for each model."""

    name = "profile"
    question = "Where does the time of the main models go?"
    one_seed = "draws its weights and images once"
    no_budget = "looks at a fixed number of passes"

    def cells(self, settings: Settings) -> list[Cell]:
        return [
            Cell(f"{name}/seed{settings.seeds[0]}", {"work": name, "seed": settings.seeds[0]})
            for name in WORK
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        batch, side = (8, 14) if settings.quick else SIZES[settings.device]
        torch.manual_seed(cell.options["seed"])
        once = WORK[cell.options["work"]](batch, side, settings.device)
        for _ in range(1 if settings.quick else 3):
            once()
        passes = QUICK_PASSES if settings.quick else PASSES
        with Executed() as executed:
            once()
        activities = [ProfilerActivity.CPU]
        if settings.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(passes):
                once()
            if settings.device == "cuda":
                torch.cuda.synchronize()
        return {
            "batch": batch,
            "side": side,
            "operations": executed.operations.total(),
            "multiply_adds": executed.multiply_adds,
            **shares(profiler.key_averages(), passes, settings.device),
            "before": earlier(cell.key, settings.device),
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        done = [cell for cell in cells if cell["status"] == "ok"]
        return [_summary(done), _top(done)]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        made = []
        for cell in cells:
            before = cell["data"]["before"] if cell["status"] == "ok" else None
            if before is not None:
                now = cell["data"]["operations"]
                made.append(
                    Claim(
                        f"operations of one pass, {cell['options']['work']}",
                        f"{before['operations']} at commit {before['commit']}",
                        str(now),
                        f"{now / before['operations']:.2f}x",
                        "none",
                        "-",
                    )
                )
        return made


def shares(events: Any, passes: int, device: str) -> dict[str, Any]:
    """Self times in all and by operation, a pass."""

    def spent(event: Any) -> float:
        return event.self_device_time_total if device == "cuda" else event.self_cpu_time_total

    events = [event for event in events if not event.key.startswith("Profiler")]
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    # A kernel's time on a GPU is there twice: as an event of its own, of which torch's tables make the sum,
    # and as the time of the operation that launched it, which has the name to be listed under.
    timed = operations
    if device == "cuda":
        timed = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    total = sum(map(spent, timed)) or 1.0
    largest = sorted(operations, key=spent, reverse=True)[:KEPT]
    by_key = {event.key: event.count for event in operations}
    return {
        "self_ms": total / passes / 1e3,
        "calls": sum(e.count for e in operations if e.key.startswith("aten::")) / passes,
        "launches": sum(by_key.get(name, 0) for name in LAUNCH) / passes,
        "waits": {name: by_key[name] / passes for name in WAITS if name in by_key},
        "top": [{"name": e.key[:60], "calls": e.count / passes, "share": spent(e) / total} for e in largest],
    }


def earlier(key: str, device: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """The same cell of the newest committed run on this kind of device; None without one."""
    for folder in sorted(results.glob(f"*_profile_{device}"), reverse=True):
        try:
            result = load(folder)
        except (OSError, BenchError):
            continue
        for cell in result["cells"]:
            if cell["key"] == key and cell["status"] == "ok":
                data = cell["data"]
                return {
                    "operations": data["operations"],
                    "self_ms": data["self_ms"],
                    "commit": code_of(result["provenance"], [cell]).removeprefix("commit "),
                }
    return None


def _summary(done: list[dict[str, Any]]) -> Table:
    rows = []
    for cell in done:
        d = cell["data"]
        before = d["before"]
        rows.append(
            (
                cell["options"]["work"],
                str(d["operations"]),
                "-" if before is None else str(before["operations"]),
                f"{d['multiply_adds'] / 1e6:.1f}",
                f"{d['self_ms']:.2f}",
                "-" if before is None else f"{before['self_ms']:.2f}",
                f"{1e3 * d['self_ms'] / max(d['operations'], 1):.1f}",
                ", ".join(f"{name} {count:g}" for name, count in d["waits"].items()) or "none",
                f"{d['launches']:g}",
            )
        )
    columns = (
        "pass",
        "operations",
        "before",
        "million multiply-adds",
        "self time, ms",
        "before",
        "us an operation",
        "reads that wait",
        "kernel launches",
    )
    note = (
        "Per pass. Self time is the sum over operations, of the device on a GPU; the profiler's own cost is "
        "in it. 'Before' is the newest committed run."
    )
    return Table("Where the time goes", columns, rows, (note,))


def _top(done: list[dict[str, Any]]) -> Table:
    rows = [
        (cell["options"]["work"], top["name"], f"{top['calls']:g}", f"{100 * top['share']:.1f} %")
        for cell in done
        for top in cell["data"]["top"]
    ]
    return Table("Operations by self time", ("pass", "operation", "calls", "share"), rows, long=True)


register(Profile())
