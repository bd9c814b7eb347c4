"""Step counts of a trained wormhole network, sample by sample, and what would predict them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw
from twnn_plugin.blocks import Feedback
from zoo.config import TrainConfig
from zoo.data import Batches, DataSplits, load_data
from zoo.train import train

__all__ = ["POLICIES", "config_of", "record"]

POLICIES = {
    "budget": {"budget": 0.3},
    "always": {"policy": "always"},
}
"""Options of the two networks: a gate that opens for 30 % of the samples, and one that iterates them all."""


def record(policy: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train on Fashion-MNIST (digits, if quick), then count the steps of the training samples, twice.

    The counts are those of two epochs that follow each other, so that the one is the forecast of the other.

    Returns:
        ``steps`` after the last epoch, ``before``: those of the epoch before, ``score``: the gate's
        probability in the epoch before; a list with one entry a sample each. ``outside``: the cost of the
        open-loop pass in replays of the span, by multiply-adds.
    """
    data = _data(quick)
    config = config_of(policy, seed, quick)
    first = train(config, data=data)
    before, score, _ = _count(first.model, data, 0 if quick else 2000)
    last = train(replace(config, epochs=1, lr=5e-4, seed=seed + 1), data=data, model=first.model)
    steps, _, outside = _count(last.model, data, 0 if quick else 2000)
    return {
        "dataset": data.spec.name,
        "accuracy": last.metrics["val_accuracy"],
        "steps": steps,
        "before": before,
        "score": [round(s, 3) for s in score],
        "outside": outside,
        "max_iter": 50,
    }


def config_of(policy: str, seed: int, quick: bool) -> TrainConfig:
    """How a network is trained at first; an epoch at a lower learning rate follows."""
    return TrainConfig(
        model="twnn_resnet8_cifar",
        model_kwargs={"tol": 1e-3, "max_iter": 50, **POLICIES[policy]},
        dataset="digits" if quick else "fashion_mnist",
        epochs=1 if quick else 3,
        batch_size=64,
        lr=2e-3,
        seed=seed,
        device="cpu",
        log_interval=0,
    )


def _data(quick: bool) -> DataSplits:
    if quick:
        data = load_data("digits")
        return DataSplits(data.spec, data.train.subset(torch.arange(192)), data.val, data.test)
    data = load_data("fashion_mnist")
    few = torch.arange(8000)
    return DataSplits(
        data.spec, data.train.subset(few), data.val.subset(torch.arange(1000)), data.test.subset(few[:1])
    )


def _count(model: nn.Module, data: DataSplits, limit: int) -> tuple[list[int], list[float], float]:
    """Steps and gate scores of the first training samples, and what the rest of a pass costs."""
    model.eval()
    rows = min(limit or len(data.train), len(data.train))
    subset = data.train.subset(torch.arange(rows))
    stream = tw.stream(model, Batches(subset, data.spec, 100))
    for _ in stream:
        pass
    (span,) = stream.report.spans
    return span.steps.tolist(), span.probability.tolist(), _outside(model, data)


@torch.no_grad()
def _outside(model: nn.Module, data: DataSplits) -> float:
    """Multiply-adds of an open-loop pass over those of a replay."""
    (feedback,) = (m for m in model.modules() if isinstance(m, Feedback))
    policy, image = feedback.policy, torch.zeros(1, *data.spec.input_size)
    counter = FlopCounterMode(display=False)
    try:
        tw.configure(model, policy="never")
        with counter:
            model(image)
        tw.configure(model, policy="always")
        model(image)
        (span,) = tw.report(model)
    finally:
        feedback.policy = policy
    return counter.get_total_flops() / 2 / (span.multiply_adds / span.evaluations)
