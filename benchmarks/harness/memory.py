"""Peak memory of one run.

CUDA: the caching allocator's ``max_memory_allocated``. CPU: the allocations and frees that
``torch.profiler`` records, summed in the order of time; what was live before the run does not count, and
scratch space that a kernel takes behind torch's allocator (oneDNN's, for one) is not seen.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]

# The tracer writes a line to stderr at every start and stop, in the middle of the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The largest number of bytes live at once during ``run``, above what was live before it."""
    if device.startswith("cuda"):
        gc.collect()  # what is freed during the run would make its peak look lower
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"),
        key=lambda change: change[0],
    )
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak
