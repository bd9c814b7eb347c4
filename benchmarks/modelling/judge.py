"""What is measured on a trained network: accuracy, calibration, work, memory, latency, curves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.selection import selection_of
from zoo.metrics import ClassificationSums
from zoo.models import DEQNet

from ..harness import Executed, Stopwatch, interleave, peak_bytes, ratio_of, spread_of
from ..training.tasks import Part, parts
from .arms import ARMS, Arm, Scale
from .networks import Shape
from .train import Run

__all__ = ["LATENCY_BATCHES", "data_of", "judge", "work_of"]

LATENCY_BATCHES = (1, 256)
LOOKED_AT = 1000
"""Validation images that are looked at while training."""


def data_of(dataset: str, scale: Scale, quick: bool) -> dict[str, Part]:
    """``"train"``, ``"val"``, ``"test"``, and ``"look"``, a part of the validation images."""
    made = {
        name: replace(part, images=part.images.contiguous())
        for name, part in parts(dataset, scale.img_size, scale.rows, quick).items()
    }
    val = made["val"]
    rows = torch.randperm(len(val.labels), generator=torch.Generator().manual_seed(0))[:LOOKED_AT]
    made["look"] = Part(val.images[rows], val.labels[rows], {})
    return made


@torch.no_grad()
def tested(model: nn.Module, part: Part, batch: int = 250) -> dict[str, float]:
    """Accuracy, likelihood, calibration error, multiply-adds executed an image, and who iterated."""
    model.eval()
    device = next(model.parameters()).device
    sums, steps = ClassificationSums(), []
    with Executed() as executed:
        for images, labels in zip(part.images.split(batch), part.labels.split(batch), strict=True):
            sums.update(model(images.to(device)), labels)
            steps.append(steps_of(model))
    found = {
        "accuracy": 100 * sums.accuracy,
        "nll": sums.nll,
        "ece": 100 * sums.ece,
        "multiply_adds": executed.multiply_adds / len(part.labels),
    }
    known = [step for step in steps if step is not None]
    if known:
        every = torch.cat(known).float()
        found["share"] = float((every > 0).float().mean())
        found["steps"] = float(every[every > 0].mean()) if bool((every > 0).any()) else 0.0
    return found


def steps_of(model: nn.Module) -> Tensor | None:
    """(B,) iterations in the newest pass, 0 where a sample was not iterated; None for a plain network."""
    selection = selection_of(model)
    if selection is not None:
        assert selection.last is not None
        return selection.last.steps.sum(1).cpu()
    if isinstance(model, DEQNet):
        return model.last_info["nstep"].cpu()
    try:
        record = tw.report(model)[0]
    except tw.AttachError:
        return None
    return torch.where(record.open, record.steps, 0).cpu()


def work_of(run: Run, budget_s: float, device: str) -> dict[str, Any]:
    """One update, beside one of the plain backbone in the same rounds: time, and peak memory alone.

    On an idle machine and a busy one the seconds differ, the ratios hardly.
    """
    plain = Run(_arm("plain"), run.shape, run.scale, run.parts, 1e-2, run.seed, device, run.amp)
    images, labels = next(plain.batches)

    def update(of: Run) -> Callable[[Stopwatch | None], None]:
        def once(watch: Stopwatch | None) -> None:
            of.model.train()
            with torch.autocast(device, torch.bfloat16, enabled=of.amp):
                loss = of.arm.network.loss(of.model, images, labels, of.draw)
            if watch is not None:
                watch.lap("forward")
            of.optimizer.zero_grad()
            loss.backward()
            if watch is not None:
                watch.lap("backward")

        return once

    runs = {"plain": update(plain), "this": update(run)}
    laps = interleave(runs, device=device, budget_s=budget_s, min_rounds=3, slow_factor=1e9)
    found: dict[str, Any] = {}
    for phase in ("forward", "backward", "total"):
        mine, theirs = ([lap[phase] for lap in laps[name] if lap] for name in ("this", "plain"))
        found[phase] = spread_of(mine).as_json()
        found[f"{phase}_ratio"] = ratio_of(mine, theirs).as_json()
    found["peak_bytes"] = peak_bytes(lambda: runs["this"](None), device)
    return found


def latency_of(model: nn.Module, run: Run, budget_s: float, device: str) -> dict[str, Any]:
    """A forward pass at each batch size, beside the plain backbone's in the same rounds."""
    plain = Run(_arm("plain"), run.shape, run.scale, run.parts, 1e-2, run.seed, device, run.amp).model.eval()
    model.eval()
    found: dict[str, Any] = {}
    for batch in LATENCY_BATCHES:
        images = run.parts["test"].images[:batch].to(device)

        def passing(network: nn.Module, images: Tensor = images) -> Callable[[Stopwatch], None]:
            def once(watch: Stopwatch) -> None:
                with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=run.amp):
                    network(images)
                watch.lap("forward")

            return once

        laps = interleave(
            {"plain": passing(plain), "this": passing(model)},
            device=device,
            budget_s=budget_s,
            min_rounds=3,
            slow_factor=1e9,
        )
        mine, theirs = ([lap["total"] for lap in laps[name] if lap] for name in ("this", "plain"))
        found[str(batch)] = {**spread_of(mine).as_json(), "ratio": ratio_of(mine, theirs).as_json()}
    return found


def judge(run: Run, shape: Shape, budget_s: float, device: str) -> dict[str, Any]:
    """Everything but the training itself: JSON values."""
    network = run.arm.network
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "work": work_of(run, budget_s, device),
    }
    model = network.in_use(run.model, shape).eval()
    found["chosen"] = network.ready(model, run.parts["val"])
    found["test"] = tested(model, run.parts["test"])
    found["latency"] = latency_of(model, run, budget_s / 2, device)
    found["curve"] = [
        {"at": label, **tested(other, run.parts["test"])}
        for label, other in network.dial(model, run.parts["val"], shape)
    ]
    return found


def _arm(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)
