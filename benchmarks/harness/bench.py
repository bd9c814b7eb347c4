"""What a benchmark is: cells that are run one by one, and tables, plots and claims made of their data.

A cell's data are plain JSON values, so that tables and plots can be made again from a results folder.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from twnn_plugin.errors import nearest

__all__ = [
    "RECIPE",
    "REGISTRY",
    "BenchError",
    "Benchmark",
    "Cell",
    "Claim",
    "Interrupted",
    "PageError",
    "Settings",
    "Table",
    "find",
    "fingerprint",
    "register",
]

RECIPE = "recipe"
"""The option of a trained cell that holds the :func:`fingerprint` of how it is trained: a run that goes on
measures cells of another one again. Cells of old files have none."""


class BenchError(ValueError):
    """A mistake of the user's: one line on stderr, exit code 2."""


class PageError(RuntimeError):
    """All cells are in ``result.json``, but a table, a plot or the claims could not be made of them."""


class Interrupted(KeyboardInterrupt):
    """The user has stopped a run; the message says how to go on."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; recorded with its results.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        quick: small problems and few rounds: shows that everything works, its figures are noise.
        seeds: one set of cells for each.
        threads: torch's intra-op threads on the CPU.
        only: run the cells whose key contains one of these; empty: all.
        budget: multiplies the time that each cell spends on timing.
        full: the large scale of a benchmark that has two.
    """

    device: str = "cpu"
    quick: bool = False
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    only: tuple[str, ...] = ()
    budget: float = 1.0
    full: bool = False

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "seeds": list(self.seeds), "only": list(self.only)}


@dataclass(frozen=True)
class Cell:
    """One unit of work that can fail alone: a unique key and JSON options."""

    key: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table as it is written, and, unless it is long, printed."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    long: bool = False


@dataclass(frozen=True)
class Claim:
    """One line of the index page, as strings made from measured figures.

    Attributes:
        claim: what is claimed, in words.
        peer: the peer's (or a paper's) figure.
        ours: our figure.
        ratio: the headline ratio with its spread, or what stands in its place.
        target: what was to be reached.
        met: ``"yes"``, ``"no"``, ``"not measured"`` or ``"in part"``.
    """

    claim: str
    peer: str
    ours: str
    ratio: str
    target: str
    met: str


class Benchmark(ABC):
    """A question with its cells. Derive, set the first two attributes, and ``register`` an instance.

    Attributes:
        name: on the command line.
        question: in one line.
        scales: whether there is a large scale (``Settings.full``).
        cpu_only: why it has no use for another device; empty: it has.
        one_seed: why it has no use for several seeds; empty: it has.
        no_budget: why it has no use for ``Settings.budget``; empty: it has.
    """

    name: str
    question: str
    scales: bool = False
    cpu_only: str = ""
    one_seed: str = ""
    no_budget: str = ""

    @abstractmethod
    def cells(self, settings: Settings) -> list[Cell]:
        """The work, in the order in which it is done."""

    @abstractmethod
    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        """Measure one cell; what it raises is recorded as the cell's failure."""

    @abstractmethod
    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        """Tables of the finished cells (``{"key", "options", "status", "reason", "data", "origin"}``)."""

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        """Write small PNG files into the folder; their paths."""
        return []

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        """Lines for the index page."""
        return []

    def check(self, settings: Settings) -> None:  # noqa: B027  (most run with any settings)
        """Raise :class:`BenchError` where this benchmark cannot run with these settings."""


def fingerprint(*recipe: Any) -> str:
    """A short hash of plain values and dataclasses that say how a cell is trained."""
    text = json.dumps(recipe, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{value!r} has no fingerprint: only plain values and dataclasses have.")
    return {"type": type(value).__name__, **{f.name: getattr(value, f.name) for f in fields(value)}}


REGISTRY: dict[str, Benchmark] = {}


def register(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name."""
    REGISTRY[benchmark.name] = benchmark
    return benchmark


def find(name: str) -> Benchmark:
    """The benchmark of this name; :class:`BenchError` with the nearest name if there is none."""
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise BenchError(f"Unknown benchmark {name!r}.{nearest(name, REGISTRY)} Known: {known}.")
    return REGISTRY[name]
