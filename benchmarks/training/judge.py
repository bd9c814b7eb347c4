"""Measuring a trained arm: accuracy, cost, gates, steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import twnn_plugin as tw

from .tasks import Opening, Part
from .unsure import Unsure, entropy

__all__ = ["judge_plain", "judge_wormhole"]

_BATCH = 500
GATES = ("entropy", "learned")
SETTLED = 1e-3
FOLLOW = 0.005  # remembers two hundred images
"""Tolerance at which the share of samples that have a fixed point is told."""


@dataclass(frozen=True)
class Pass:
    """One pass over a part in eval mode.

    Attributes:
        logits: (N, 10).
        opened: (N,) bool.
        steps: (N,) replays.
        settled: (N,) bool, closed ones included.
        score: (N,) of the learned gate.
        extra: mean multiply-adds of the replays, a sample.
    """

    logits: Tensor
    opened: Tensor
    steps: Tensor
    settled: Tensor
    score: Tensor
    extra: float


def run_over(model: nn.Module, part: Part) -> Pass:
    """The model as it is configured, on all images of a part; what it says, on the CPU."""
    model.eval()
    logits, records = [], []
    with torch.no_grad():
        for images in _batches(model, part):
            logits.append(model(images).cpu())
            records += tw.report(model)

    def rows(name: str) -> Tensor:
        return torch.cat([getattr(record, name) for record in records]).cpu()

    return Pass(
        torch.cat(logits),
        rows("open"),
        rows("steps"),
        rows("status") == int(tw.Status.converged),
        rows("probability"),
        sum(record.multiply_adds for record in records) / len(part.labels),
    )


def _batches(model: nn.Module, part: Part) -> Iterator[Tensor]:
    """The images of a part, batch by batch, where the model is."""
    device = next(model.parameters()).device
    return (images.to(device) for images in part.images.split(_BATCH))


def correct(logits: Tensor, part: Part) -> Tensor:
    """(N,) float, 1 where right."""
    return (logits.argmax(dim=1) == part.labels).float()


def percent(right: Tensor) -> float:
    """Of a (N,) tensor of zeros and ones."""
    return round(100 * float(right.mean()), 3)


def judge_plain(model: nn.Module, parts: dict[str, Part]) -> dict[str, Any]:
    """Accuracy of a plain network."""
    found: dict[str, Any] = {}
    model.eval()
    with torch.no_grad():
        for name in ("val", "test"):
            logits = torch.cat([model(images).cpu() for images in _batches(model, parts[name])])
            found[name] = {"accuracy": percent(correct(logits, parts[name]))}
    return found


def judge_wormhole(model: nn.Module, opening: Opening, parts: dict[str, Part], base: int) -> dict[str, Any]:
    """Accuracy closed, open and gated, cost, gates against chance, steps.

    The tolerance, the kind of gate and its thresholds are chosen on the validation part; the share of open
    samples, too, where the opening has a budget.

    Args:
        model: trained.
        opening: what the wormhole is for.
        parts: ``"val"`` and ``"test"``.
        base: multiply-adds of the open-loop pass.
    """
    source = opening.span.partition("->")[0]
    unsure = Unsure(model, source)
    val, test = parts["val"], parts["test"]
    closed = {name: _closed(model, parts[name]) for name in ("val", "test")}
    opening, tol, open_val, tried = _settings(model, opening, closed["val"], val, base)
    tw.configure(model, tol=tol)
    open_test = run_over(model, test)
    found: dict[str, Any] = {
        "tol": tol,
        "tolerances": {str(t): [accuracy, base + seen.extra] for accuracy, t, seen in tried},
        "val": {
            "closed": percent(correct(closed["val"][0], val)),
            "open": percent(correct(open_val.logits, val)),
        },
        "test": {
            "closed": percent(correct(closed["test"][0], test)),
            "open": percent(correct(open_test.logits, test)),
        },
        "open_cost": base + open_test.extra,
    }
    scores = {
        name: {"entropy": closed[name][1], "learned": seen.score}
        for name, seen in (("val", open_val), ("test", open_test))
    }
    found["gates"] = _gates(opening, scores, closed, (open_val, open_test), (val, test), base)
    found["gate"] = max(GATES, key=lambda kind: found["gates"][kind]["val_accuracy"])
    threshold = found["gates"][found["gate"]]["threshold"]
    found["gated"] = run_gated(model, unsure, found["gate"], threshold, opening, (val, test), base)
    found["gated"]["random"] = random_gate(found["gated"]["share"], closed["test"][0], open_test, test)
    found["steps"] = _steps(model, opening, open_test, scores["test"][found["gate"]] > threshold, test)
    return found


def _settings(
    model: nn.Module, opening: Opening, closed: tuple[Tensor, Tensor], val: Part, base: int
) -> tuple[Opening, float, Pass, list[tuple[float, float, Pass]]]:
    """What validation data choose: the opening with its share, the tolerance, its pass; and what was tried.

    What was tried: the accuracy with all samples open, the tolerance and the pass.
    """
    tw.configure(model, max_iter=opening.max_iter, policy="always")
    tried = []
    for tol in opening.tolerances:
        tw.configure(model, tol=tol)
        seen = run_over(model, val)
        tried.append((percent(correct(seen.logits, val)), tol, seen))
    if opening.most is None:
        # The best on validation data; among those within a tenth of a point of it, the cheapest.
        best = max(accuracy for accuracy, _, _ in tried)
        _, tol, seen = max((t for t in tried if t[0] >= best - 0.1), key=lambda t: t[1])
    else:
        opening, tol, seen = _within(opening, tried, closed, val, base)
    return opening, tol, seen, tried


def _within(
    opening: Opening,
    tried: list[tuple[float, float, Pass]],
    closed: tuple[Tensor, Tensor],
    val: Part,
    base: int,
) -> tuple[Opening, float, Pass]:
    """What does best on the validation part within the budget: the opening with a share, tolerance and pass.

    Among those within a tenth of a point of the best, the cheapest.
    """
    options = []
    for _, tol, seen in tried:
        each = seen.extra / max(float(seen.steps.float().mean()), 1e-9)
        for share in opening.shares:
            goes = closed[1] > torch.quantile(closed[1], 1 - share)
            cost = base + each * float((goes * seen.steps).float().mean())
            right = torch.where(goes, correct(seen.logits, val), correct(closed[0], val))
            options.append((cost, percent(right), share, tol, seen))
    assert opening.most is not None
    paid = [option for option in options if option[0] <= opening.most * base] or [
        min(options, key=lambda option: option[0])
    ]
    best = max(option[1] for option in paid)
    _, _, share, tol, seen = min((o for o in paid if o[1] >= best - 0.1), key=lambda option: option[0])
    return replace(opening, share=share), tol, seen


def _closed(model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
    """Logits of the closed network, and their entropy."""
    tw.configure(model, policy="never")
    logits = run_over(model, part).logits
    return logits, entropy(logits)


def _gates(
    opening: Opening,
    scores: dict[str, dict[str, Tensor]],
    closed: dict[str, tuple[Tensor, Tensor]],
    passes: tuple[Pass, Pass],
    split: tuple[Part, Part],
    base: int,
) -> dict[str, Any]:
    """For each kind of gate its curve on the test part, and its threshold and validation accuracy.

    A sample's answer does not depend on its batch mates, so that a gated pass is put together from the closed
    and the open one; the headline is also run for real.
    """
    found: dict[str, Any] = {}
    (open_val, open_test), (val, test) = passes, split
    each = open_test.extra / max(float(open_test.steps.float().mean()), 1e-9)
    for kind in GATES:
        curve = []
        for share in sorted({*opening.shares, opening.share}):
            threshold = float(torch.quantile(scores["val"][kind], 1 - share))
            goes = scores["test"][kind] > threshold
            right = torch.where(goes, correct(open_test.logits, test), correct(closed["test"][0], test))
            got = float(goes.float().mean())
            curve.append(
                {
                    "wanted": share,
                    "share": round(got, 4),
                    "accuracy": percent(right),
                    "random": random_gate(got, closed["test"][0], open_test, test),
                    "cost": round(base + each * float((goes * open_test.steps).float().mean())),
                }
            )
            if share == opening.share:
                mine = scores["val"][kind] > threshold
                both = correct(open_val.logits, val), correct(closed["val"][0], val)
                found[kind] = {"threshold": threshold, "val_accuracy": percent(torch.where(mine, *both))}
        found[kind]["curve"] = curve
    return found


def random_gate(share: float, closed: Tensor, opened: Pass, part: Part) -> float:
    """Expected accuracy of a gate that opens at random with this probability."""
    mixed = share * correct(opened.logits, part) + (1 - share) * correct(closed, part)
    return percent(mixed)


def run_gated(
    model: nn.Module,
    unsure: Unsure,
    kind: str,
    threshold: float,
    opening: Opening,
    split: tuple[Part, Part],
    base: int,
) -> dict[str, Any]:
    """The headline: the network with its gate, run on the test part."""
    if kind == "entropy":
        unsure.threshold = threshold
        tw.configure(model, policy=unsure)
    else:
        tw.configure(model, policy="gate")
        tw.calibrate(model, list(_batches(model, split[0])), budget=opening.share)
    seen = run_over(model, split[1])
    return {
        "wanted": opening.share,
        "share": float(seen.opened.float().mean()),
        "accuracy": percent(correct(seen.logits, split[1])),
        "cost": base + seen.extra,
        "settled": float(seen.settled[seen.opened].float().mean()) if bool(seen.opened.any()) else None,
        **_arriving(model, unsure, kind, opening.share, split[1]),
        "followed": _followed(model, unsure, kind, opening.share, split[1]),
    }


def _arriving(model: nn.Module, unsure: Unsure, kind: str, share: float, test: Part) -> dict[str, Any]:
    """The test images in their order, by a threshold that goes after the share on them, without labels."""
    if kind == "entropy":
        unsure.following = share, FOLLOW
        seen = run_over(model, test)
        unsure.following = None
    else:
        tw.configure(model, follow=FOLLOW)
        seen = run_over(model, test)
        tw.configure(model, follow=None)
    return {
        "arriving": float(seen.opened.float().mean()),
        "arriving_accuracy": percent(correct(seen.logits, test)),
    }


def _followed(model: nn.Module, unsure: Unsure, kind: str, share: float, test: Part) -> float:
    """The open share of every other test image, by a threshold from those in between, without labels."""
    told, kept = test.every(2, 0), test.every(2, 1)
    if kind == "entropy":
        unsure.threshold = float(torch.quantile(_closed(model, told)[1], 1 - share))
        tw.configure(model, policy=unsure)
    else:
        tw.calibrate(model, list(_batches(model, told)), budget=share)
    return float(run_over(model, kept).opened.float().mean())


def _steps(model: nn.Module, opening: Opening, seen: Pass, goes: Tensor, part: Part) -> dict[str, Any]:
    """How many replays, what they follow, and whether there is a fixed point at all."""
    found: dict[str, Any] = {
        "histogram": torch.bincount(seen.steps, minlength=opening.max_iter + 1).tolist(),
        "histogram_gated": torch.bincount(seen.steps * goes, minlength=opening.max_iter + 1).tolist(),
        "mean": float(seen.steps.float().mean()),
        "settled": float(seen.settled.float().mean()),
    }
    tw.configure(model, tol=SETTLED, max_iter=40, policy="always")
    fixed = run_over(model, part)
    found["fixed_point"] = float(fixed.settled.float().mean())
    found["fixed_point_accuracy"] = percent(correct(fixed.logits, part))
    found["fixed_point_steps"] = float(fixed.steps.float().mean())
    found["rank_correlation"] = {name: _rank(fixed.steps, value) for name, value in part.difficulty.items()}
    return found


def _rank(steps: Tensor, value: Tensor) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    if steps.unique().numel() < 2 or value.unique().numel() < 2:
        return None
    result: Any = spearmanr(steps.numpy(), value.numpy())
    return round(float(result.statistic), 4)
