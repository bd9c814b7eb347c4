"""Figures of an evaluation against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from zoo.build import build_model
from zoo.data import Batches, load_data
from zoo.errors import DataError
from zoo.evalrun import figure_rows
from zoo.evaluate import evaluate
from zoo.metrics import ClassificationSums

WORMHOLE_FIGURES = ("open_share", "mean_steps", "converged_share", "rows_evaluated", "multiply_adds")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def batches(digits):
    return Batches(digits.val, digits.spec, 64)


def logits_of(*probabilities: float) -> torch.Tensor:
    """Two-class logits whose first class has these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], -1)


def test_accuracy_likelihood_and_calibration_by_hand():
    sums = ClassificationSums(bins=5)
    # Confidences 0.9, 0.9, 0.7, 0.7 in the bins (0.8, 1] and (0.6, 0.8]; right, wrong, right, right.
    sums.update(logits_of(0.9, 0.9, 0.7, 0.3), torch.tensor([0, 1, 0, 1]))
    assert sums.count == 4
    assert sums.accuracy == 0.75
    assert sums.nll == pytest.approx(-(math.log(0.9) + math.log(0.1) + 2 * math.log(0.7)) / 4)
    assert sums.ece == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.7))


def test_perfect_confidence_is_perfectly_calibrated():
    sums = ClassificationSums()
    sums.update(torch.tensor([[100.0, -100.0], [-100.0, 100.0]]), torch.tensor([0, 1]))
    assert sums.ece == 0
    assert sums.nll == 0


def test_sums_do_not_depend_on_the_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    whole, parts = ClassificationSums(), ClassificationSums()
    whole.update(logits, labels)
    for rows in torch.arange(50).split(8):
        parts.update(logits[rows], labels[rows])
    torch.testing.assert_close(whole.sums, parts.sums)
    assert whole.sums[2:17].sum() == 50


def test_a_plain_model_has_no_wormhole_figures(digits, batches):
    model = build_model("cnn3", digits.spec).train()
    result = evaluate(model, batches, latency=False)
    assert result.samples == len(digits.val)
    assert all(getattr(result, name) is None for name in (*WORMHOLE_FIGURES, "latency_ms"))
    assert model.training  # as it was
    assert dict(figure_rows(result.as_dict()))["mean steps where open"] == "n/a"


def test_figures_agree_with_the_models_own_outputs(digits, batches):
    model = build_model("cnn3", digits.spec).eval()
    result = evaluate(model, batches, latency=False)
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches])
    labels = digits.val.labels
    assert result.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert result.nll == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.fixture(scope="module")
def opened(digits):
    """A small network whose one wormhole is open for every row."""
    torch.manual_seed(0)
    model = tw.attach(build_model("resnet8_cifar", digits.spec), wormholes="layer3->layer2")
    return tw.configure(model, policy="always", max_iter=6, tol=1e-6)


def test_wormhole_figures_are_sums_of_the_reports(digits, batches, opened):
    result = evaluate(opened, batches, latency=False)
    opened.eval()
    records = []
    with torch.no_grad():
        for images, _ in batches:
            opened(images)
            records += tw.report(opened)
    gate, steps, status = (
        torch.cat([getattr(r, name) for r in records]) for name in ("gate", "steps", "status")
    )
    is_open = gate > 0
    assert is_open.any()
    assert result.open_share == pytest.approx(is_open.double().mean().item())
    assert result.mean_steps == pytest.approx(steps[is_open].double().mean().item())
    assert result.converged_share == pytest.approx((status[is_open] == 0).double().mean().item())
    assert result.rows_evaluated == sum(record.evaluations for record in records) > 0
    assert result.multiply_adds == sum(record.multiply_adds for record in records)


def test_a_closed_wormhole_has_no_steps(batches, opened):
    tw.configure(opened, policy="never")
    result = evaluate(opened, batches, latency=False)
    tw.configure(opened, policy="always")
    assert result.open_share == 0
    assert result.mean_steps is None
    assert result.converged_share is None
    assert dict(figure_rows(result.as_dict()))["open-gate share"] == "0.00%"


def test_latency_is_measured_at_both_batch_sizes(digits, batches):
    sizes = []

    class Spy(nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return torch.zeros(len(images), 10)

    result = evaluate(Spy(), batches)
    assert result.batch_size == 64
    assert result.latency_ms > 0
    assert result.latency_ms_single > 0
    assert sizes[-1] == 1
    assert sizes.count(1) == sizes.count(64) - 2  # two full batches belong to the figures


def test_mixed_precision_takes_part(digits, batches):
    model = build_model("cnn3", digits.spec)
    assert (
        evaluate(model, batches, latency=False).nll != evaluate(model, batches, amp=True, latency=False).nll
    )


def test_no_images(digits):
    nothing = Batches(digits.val.subset(torch.arange(0)), digits.spec, 8)
    with pytest.raises(DataError, match="no images"):
        evaluate(build_model("cnn3", digits.spec), nothing)
