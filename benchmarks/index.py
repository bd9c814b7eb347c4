"""``benchmarks/README.md``, made from the committed results: no figure on it is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import seeds
from .harness.provenance import code_of, days_of, versions_of, where_of
from .harness.run import RESULTS, load

__all__ = ["PAGE", "render_index", "write_index"]

PAGE = RESULTS.parent / "README.md"

_HEAD = """# Benchmarks

<!-- Made by `python -m benchmarks index` from the files in results/. Do not edit. -->

One command for each question; `python -m benchmarks --list` shows them. A run writes `result.json`
(figures, versions, seeds, command), `table.md` and plots into a dated folder of `results/`; this page is made
from those files by `python -m benchmarks index`, and a test fails if they disagree. Several commits
with numbers of cells: a run was gone on with (`--resume`) and kept what an earlier commit had measured.
`python -m benchmarks all --quick --out FOLDER` runs all of them, small and short, to see that they work.

Ratios are medians over interleaved rounds with their quartiles; above 1 ours is faster; in parentheses, the
ratio if torchdeq's `simple_fixed_point_iter` counts, which has no stopping rule and is told the right number
of iterations. "Equal gradient error" and what counts as converged are defined in `solving/compare.py`, the
problems in `solving/problems.py`, and torchdeq's settings, with where they come from, in
`solving/candidates.py`.
"""
_WHY = """### Where a target was not reached, and why

- *Mixed difficulty.* At the loose tolerance most rows are done after a handful of evaluations. What is
  left for most of the iterations are a few hard rows, for which the calls of operators within the map are
  the time, not the arithmetic: a few rows of a small map cost nearly as much as many, and a convolution of
  one image several times its share of the batch. At the tight tolerance, where torchdeq runs the whole batch
  much longer, the ratio of the vector problem is beyond what was aimed for.
- *Slow, uniform.* No row can leave early, and the accelerated iteration already needs about as few
  evaluations as a Krylov method that is optimal for the linearised map. Seven tenths of the time are the
  map's own.
- *Conv cell, uniform.* At the loose tolerance both sides make a dozen evaluations, torchdeq
  hardly more than ours: had ours nothing to do besides, it would just about reach the target.
- *Easy, small.* The map costs no more than half a dozen calls of operators. What torch and Python do around a
  call of the map, and the fixed costs of a solve and of its graph, take twice that; what lies between two
  evaluations is two calls.
- *Memory.* Plain iteration, forward and backward, stays within the share of torchdeq's peak that was aimed
  for, and within the growth over iterations. Anderson's history does not: choose `solver="picard"` with
  `adjoint=tw.adjoint("implicit", solver="picard")` where memory is short.
- *Backward, long solves.* Both sides spend their time on products with the same Jacobian there.
- *Closed wormholes.* One compiled call, what Python does around it and the hooks of the span's modules take a
  tenth to a fifth of a millisecond for one image: their code and data are out of the caches, which the
  network has filled since the last pass. That is more than the aim where a pass takes a few milliseconds.
- *Streaming.* Each turn of a pass's thread takes the time of some ten operators: more than the rows that
  wait cost where the map is a small vector's.
- *Fashion-MNIST.* Nothing in this task needs feedback. On validation images the wormhole network, as it is
  trained here, and the plain one of equal training compute are within 0.2 points of each other in the mean
  of five seeds, and nothing that was tried is ahead ([docs/training.md](../docs/training.md)).
- *Open shares.* A threshold that opens for half of the validation images opens for half of others as far as
  they are alike: of the test digits, which are other scans, the closed head is a little surer. What is left
  between halves of the test images is of the size of chance ([docs/training.md](../docs/training.md)).
"""
_DEVICES = (
    ("cpu", "On a CPU", "not yet measured on a CPU"),
    ("cuda", "On a GPU", "not yet measured on a GPU"),
)


def render_index(results: Path = RESULTS) -> str:
    """The page for a folder of results."""
    found = [(folder, load(folder)) for folder in _newest(results)]
    parts = [_HEAD]
    for device, title, missing in _DEVICES:
        mine = [(f, r) for f, r in found if r["provenance"]["settings"]["device"] == device]
        parts.append(f"## {title}\n")
        parts += [_section(folder, result) for folder, result in mine] or [f"{missing}\n"]
        if mine and device == "cpu":
            parts.append(_WHY)
    # On a CPU if on both: that is where all of them can run.
    ordered = sorted(found, key=lambda pair: pair[1]["provenance"]["settings"]["device"] == "cpu")
    parts.append(seeds.section({result["benchmark"]: (folder.name, result) for folder, result in ordered}))
    return "\n".join(parts).rstrip("\n") + "\n"


def write_index(results: Path = RESULTS, page: Path = PAGE) -> Path:
    """Write the page; its path."""
    page.write_text(render_index(results), encoding="utf-8")
    return page


def _newest(results: Path) -> list[Path]:
    """Of each benchmark and device the newest folder, in the order of their names.

    Folders are called DATE_NAME_DEVICE, or DATE_gpu.
    """
    newest: dict[str, Path] = {}
    for folder in sorted(p.parent for p in results.glob("*/result.json")):
        newest[folder.name.partition("_")[2]] = folder
    return [newest[what] for what in sorted(newest)]


def _section(folder: Path, result: dict[str, Any]) -> str:
    origin = result["provenance"]
    cells = result["cells"]
    failed = [cell["key"] for cell in cells if cell["status"] != "ok"]
    lines = [
        f"### {result['benchmark']}: {result['question']}",
        "",
        f"`{origin['command']}`, {days_of(origin, cells)}, {code_of(origin, cells)}, "
        f"{where_of(origin, cells)}, {versions_of(origin, cells, 'torch', 'torchdeq')}, "
        f"seeds {', '.join(map(str, origin['settings']['seeds']))}; "
        f"[all figures](results/{folder.name}/table.md).",
        "",
        "| claim | peer's figure | ours | measured | to reach | met? |",
        "|---|---|---|---|---|---|",
    ]
    names = ("claim", "peer", "ours", "ratio", "target", "met")
    lines += ["| " + " | ".join(claim[name] for name in names) + " |" for claim in result["claims"]]
    if failed:
        lines += ["", f"Failed cells: {', '.join(failed)}."]
    return "\n".join([*lines, ""])
