"""The cells that learn: tune, train with each seed, and look at what became of signals and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twnn_plugin as tw
from zoo.data.planar import PlanarSet, PlanarSplits, planar

from .nets import Setting, Trained, accuracy, build, chain_of, describe, settings_of, train

__all__ = ["GRID", "SMOOTH", "learn", "regions", "smoothing"]

POINTS = {"peaks": 1000, "swiss_roll": 500, "circles": 500}
GRID = 48
_ROWS = 32  # test points of which distances are taken
_SHOWN = 40  # layers at which gradient norms are kept
_RESAMPLED = 1000
SMOOTH = (0.0, 1e-4, 1e-3, 1e-2)


def learn(
    name: str, kind: str, depth: int, *, seeds: Sequence[int], steps: int, quick: bool, draw: bool
) -> dict[str, Any]:
    """One kind of network, one depth, one set: tuned with the first seed, trained with all.

    Args:
        name: of the set.
        kind: of the network.
        depth: layers.
        seeds: of the weights; the points stay the same.
        steps: of training.
        quick: two settings and few points.
        draw: keep the decision regions.
    """
    data = _data(name, quick)
    settings = settings_of(kind)[-2:] if quick else settings_of(kind)
    tried = [(setting, train(kind, depth, setting, data, seeds[0], steps)) for setting in settings]
    setting, first = max(tried, key=lambda pair: pair[1].rank())
    runs = [first, *(train(kind, depth, setting, data, seed, steps) for seed in seeds[1:])]
    fresh = build(kind, depth, setting, data.classes, seeds[0])
    return {
        "setting": str(setting),
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "tuned": [{"setting": str(s), **_plain(describe(t))} for s, t in tried],
        "runs": [
            _plain({"seed": seed, "test": accuracy(run.net, data.test)[0], **describe(run)})
            for seed, run in zip(seeds, runs, strict=True)
        ],
        "gradient_start": _profile(fresh, data.train),
        "gradient_end": _profile(first.net, data.train),
        "stability": _stability(first.net, data),
        "resampled": _resampled(first, data, setting) if depth < _RESAMPLED else None,
        "regions": regions(first.net, data) if draw else None,
    }


def smoothing(name: str, kind: str, depth: int, *, seeds: Sequence[int], steps: int, quick: bool) -> Any:
    """What the smoothness regulariser does: roughness, accuracy, and accuracy in other numbers of layers."""
    data = _data(name, quick)
    setting = settings_of(kind)[1]
    records = []
    for smooth in SMOOTH[:: 3 if quick else 1]:
        for seed in seeds:
            run = train(kind, depth, setting, data, seed, steps, smooth)
            record = {
                "smooth": smooth,
                "seed": seed,
                "roughness": float(tw.smoothness(run.net)),
                "test": accuracy(run.net, data.test)[0],
            }
            for layers in (depth // 4, 4 * depth):
                record[f"test_{layers}"] = accuracy(_with_layers(run.net, layers), data.test)[0]
            records.append(_plain(record))
    return {"setting": str(setting), "records": records}


def _data(name: str, quick: bool) -> PlanarSplits:
    return planar(name, train=200, val=200, test=500) if quick else planar(name, train=POINTS[name])


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON does not know, and without digits that mean nothing."""
    return {k: _number(v) if isinstance(v, float) else v for k, v in record.items()}


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _profile(net: nn.Sequential, part: PlanarSet) -> dict[str, Any]:
    """Norms of the loss's gradient at the states before, between and after the layers.

    ``log10`` holds them at about forty places, ``spread`` is log10 of largest over smallest among all.
    """
    chain = chain_of(net)
    states = [net[0](part.points)]
    for operator in chain.operators():
        states.append(chain.advance(states[-1], operator))
    grads = torch.autograd.grad(F.cross_entropy(net[2](states[-1]), part.labels), states)
    log = torch.stack([grad.double().norm() for grad in grads]).log10()
    places = torch.linspace(0, len(states) - 1, min(len(states), _SHOWN + 1)).round().long()
    return {
        "log10": " ".join(f"{v:.2f}" for v in log[places].tolist()),
        "spread": _number(float(log.amax() - log.amin())),
        "last_to_first": _number(float(log[0] - log[-1])),
    }


def _stability(net: nn.Sequential, data: PlanarSplits) -> dict[str, Any]:
    """Figures of :func:`twnn_plugin.stability` of the trained layers at test points."""
    with torch.no_grad():
        x = net[0](data.test.points[:_ROWS])
    report = tw.stability(chain_of(net), x, rows=1)
    distance = report.distance[-1].nan_to_num(nan=math.inf)
    drift = report.energy_drift
    return _plain(
        {
            "distance_least": float(distance.amin()),
            "distance_median": float(distance.median()),
            "distance_most": float(distance.amax()),
            "size": float((report.size[-1] / report.size[0]).median()),
            "radius": float(report.radius.amax()),
            "gradient": float(report.gradient[0].median()),
            "drift": math.nan if drift is None else float(drift.abs().amax()),
        }
    )


def _resampled(run: Trained, data: PlanarSplits, setting: Setting) -> float | None:
    """Test accuracy in 1000 layers of the same equation, without further training."""
    if setting.time is None:
        return None
    return accuracy(_with_layers(run.net, _RESAMPLED), data.test)[0]


def _with_layers(net: nn.Sequential, layers: int) -> nn.Sequential:
    return nn.Sequential(net[0], chain_of(net).resampled(layers), net[2])


@torch.no_grad()
def regions(net: nn.Module, data: PlanarSplits) -> list[str]:
    """The class at each point of a grid over the square, a string of digits for each row from below."""
    axis = torch.linspace(-data.box, data.box, GRID)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    logits: Tensor = net(torch.stack([x.flatten(), y.flatten()], dim=1))
    labels = torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), 9).view(GRID, GRID)
    return ["".join(map(str, row)) for row in labels.tolist()]
