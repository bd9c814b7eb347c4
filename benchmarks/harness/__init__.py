"""What every benchmark shares: timing, memory, counting, provenance, cells that fail alone, results."""

from .bench import (
    RECIPE,
    REGISTRY,
    BenchError,
    Benchmark,
    Cell,
    Claim,
    Interrupted,
    PageError,
    Settings,
    Table,
    find,
    fingerprint,
    register,
)
from .counting import Counts, Executed, counted
from .memory import peak_bytes
from .provenance import provenance
from .run import run
from .timing import Spread, Stopwatch, interleave, ratio_of, spread_of

__all__ = [
    "RECIPE",
    "REGISTRY",
    "BenchError",
    "Benchmark",
    "Cell",
    "Claim",
    "Counts",
    "Executed",
    "Interrupted",
    "PageError",
    "Settings",
    "Spread",
    "Stopwatch",
    "Table",
    "counted",
    "find",
    "fingerprint",
    "interleave",
    "peak_bytes",
    "provenance",
    "ratio_of",
    "register",
    "run",
    "spread_of",
]
