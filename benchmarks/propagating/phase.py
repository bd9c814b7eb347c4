"""Figures 2 and 3 of Gonzalez & Mang (2018): what equal layers do to three feature vectors.

What the text of the poster leaves open, and what is taken here:

- Figure 2: features are rows there, so that its ``Y K`` is ``K^T y``; taken so, and as ``K y`` beside it. The
  value of gamma is not given: 0. The printed ``K + K^T`` is computed too, to show that it cannot be meant.
- Figure 3: K_v is 3 x 2, so that y has three entries and z two, while the features of figure 2 have
  two. Where they go, what the rest of the state is and which plane is drawn is not said. Taken: the
  features as y, with a zero appended and z = 0, drawn in the plane of y's first two entries; and as z, with
  y = 0, drawn in the plane of z.
- No number is printed with either figure; they are described in words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import twnn_plugin as tw
from twnn_plugin.blocks.propagation import Antisymmetric, Euler, Propagator, Verlet

__all__ = ["FEATURES", "LAYERS", "NUMBERS", "STEP", "figure2", "figure3", "packed", "unpacked"]

STEP, LAYERS = 0.1, 21
FEATURES = ((0.1, 0.1), (-0.1, -0.1), (0.0, 0.5))
NUMBERS = (20, 50, 100, 200, 500, 1000)
K_PLUS, K_MINUS, K_ZERO = ((2.0, -2.0), (0.0, 2.0)), ((-2.0, 0.0), (2.0, -2.0)), ((0.0, -1.0), (1.0, 0.0))
K_VERLET = ((2.0, 1.0), (-1.0, 2.0), (0.0, 1.0))

PANELS: dict[str, tuple[str, str, tuple[tuple[float, float], ...]]] = {
    "K+": ("b", "euler", K_PLUS),
    "K-": ("c", "euler", K_MINUS),
    "K0": ("d", "euler", K_ZERO),
    "K+, antisymmetric": ("e", "antisymmetric", K_PLUS),
    "K-, antisymmetric": ("f", "antisymmetric", K_MINUS),
    "K+, as printed (plus)": ("-", "printed", K_PLUS),
    "K-, as printed (plus)": ("-", "printed", K_MINUS),
}


def figure2() -> list[dict[str, Any]]:
    """One record for each panel and convention: paths of the features, distances, eigenvalues."""
    records = []
    for convention in ("Y K", "K y"):
        for name, (panel, kind, rows) in PANELS.items():
            k = torch.tensor(rows, dtype=torch.float64)
            k = k.t() if convention == "Y K" else k
            record = _identical(_euler(kind, k), torch.tensor(FEATURES, dtype=torch.float64))
            records.append({"panel": panel, "operator": name, "convention": convention, **record})
    return records


def _euler(kind: str, k: Tensor) -> Propagator:
    """21 equal layers; both antisymmetric forms have the poster's factor 1/2."""
    weight = {"euler": k, "antisymmetric": k / 2, "printed": (k + k.t()) / 2}[kind]
    make = Antisymmetric if kind == "antisymmetric" else Euler
    return _filled(make(2, LAYERS, STEP, shared=True, bias=False), weight)


def figure3() -> list[dict[str, Any]]:
    """One record for each reading of the start; the first N layers of the longest path are those of fewer."""
    features = torch.tensor(FEATURES, dtype=torch.float64)
    zeros = features.new_zeros(3, 3)
    starts = {
        "features as y": torch.cat([features, zeros], dim=1),
        "features as z": torch.cat([zeros, features], dim=1),
    }
    records = []
    for reading, start in starts.items():
        chain = Verlet(5, max(NUMBERS), STEP, shared=True, bias=False, split=3)
        _filled(chain, torch.tensor(K_VERLET, dtype=torch.float64))
        record = _identical(chain, start, [0, 1] if reading.endswith("y") else [3, 4])
        with torch.no_grad():
            record["undone"] = float((chain.inverse(chain(start)) - start).abs().max())
        records.append({"reading": reading, **record})
    return records


def _filled(chain: Propagator, weight: Tensor) -> Propagator:
    chain.double()
    with torch.no_grad():
        chain.weight.copy_(weight)
    return chain


def _identical(chain: Propagator, start: Tensor, plane: list[int] | None = None) -> dict[str, Any]:
    """What a chain of equal layers does to the rows of ``start``, after each of the numbers of layers."""
    report = tw.stability(chain, start)
    with torch.no_grad():
        states = torch.stack(list(chain.trajectory(start)))
    shown = states if plane is None else states[:, :, plane]
    drift = report.energy_drift
    numbers = [n for n in NUMBERS if n <= chain.layers] if chain.layers > LAYERS else [chain.layers]
    return {
        "paths": [packed(shown[:, row].flatten()) for row in range(start.shape[0])],
        "numbers": numbers,
        "distance_least": [float(report.distance[: n + 1].amin()) for n in numbers],
        "distance_most": [float(report.distance[: n + 1].amax()) for n in numbers],
        "distance_end": [[round(float(d), 4) for d in report.distance[n]] for n in numbers],
        "size": [float((report.size[: n + 1] / report.size[0]).amax()) for n in numbers],
        "drift": None if drift is None else [float(drift[: n + 1].abs().amax()) for n in numbers],
        "radius": float(report.radius.amax()),
    }


def packed(values: Tensor) -> str:
    """Numbers as one string: a list would take a line of JSON for each."""
    return " ".join(f"{v:.4f}".rstrip("0").rstrip(".") for v in values.tolist())


def unpacked(text: str) -> list[float]:
    """What :func:`packed` was given, to four decimals."""
    return [float(part) for part in text.split()]
