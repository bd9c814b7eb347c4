"""Sums from which accuracy, likelihood and calibration follow; sums add up across batches and processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassificationSums", "LossSums", "WormholeSums"]


class ClassificationSums:
    """Accuracy, negative log-likelihood and expected calibration error of logits.

    The calibration error bins samples by the probability of the predicted class, in equal steps of
    confidence, and averages ``|accuracy - confidence|`` over the bins, weighted by their size
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Args:
        bins: number of bins of the calibration error.

    Attributes:
        sums: (2 + 3 * bins,) float64 on the CPU: correct, nll, then count, confidence and correct of
            each bin. Adding the sums of two processes gives the sums of both.
    """

    def __init__(self, bins: int = 15):
        self.bins = bins
        self.sums = torch.zeros(2 + 3 * bins, dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K) of any float type, labels (B,)."""
        logits, labels = logits.detach().cpu().double(), labels.cpu()
        confidence, predicted = logits.softmax(-1).max(-1)
        correct = (predicted == labels).double()
        # A confidence of NaN (a broken model) lands in the first bin instead of raising here.
        place = (confidence.nan_to_num() * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        per_bin = [
            torch.zeros(self.bins, dtype=torch.float64).index_add_(0, place, values)
            for values in (torch.ones_like(confidence), confidence, correct)
        ]
        nll = F.cross_entropy(logits, labels, reduction="sum")
        self.sums += torch.cat([torch.stack([correct.sum(), nll]), *per_bin])

    @property
    def count(self) -> int:
        """Samples seen."""
        return int(self.sums[2 : 2 + self.bins].sum())

    @property
    def accuracy(self) -> float:
        """Share of samples whose largest logit is the label's."""
        return float(self.sums[0] / self.count)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return float(self.sums[1] / self.count)

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        _, confidence, correct = self.sums[2:].view(3, self.bins)
        return float((correct - confidence).abs().sum() / self.count)


class LossSums:
    """Running sums of a training epoch, kept on the device so that no step waits for it.

    Attributes:
        sums: (4,) float64: loss times samples, auxiliary loss times samples, correct, samples.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, auxiliary: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: scalar losses, logits (B, K), labels (B,) as drawn, before any mixing."""
        count = len(labels)
        correct = (logits.detach().argmax(-1) == labels).sum()
        values = [loss.detach() * count, auxiliary.detach() * count, correct, self.sums.new_full((), count)]
        self.sums += torch.stack([value.to(self.sums) for value in values])

    def means(self, sums: Tensor) -> dict[str, float]:
        """Means from (possibly added up) sums."""
        loss, auxiliary, correct, count = sums.tolist()
        return {
            "train_loss": loss / count,
            "train_auxiliary_loss": auxiliary / count,
            "train_accuracy": correct / count,
        }


class WormholeSums:
    """What the spans of a model did, added up over (image, span) pairs.

    Attributes:
        sums: (6,) float64: pairs, open pairs, their steps, their converged, rows evaluated, multiply-adds.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64)

    def update(self, model: nn.Module) -> None:
        """Add the last forward pass of ``model``; nothing if it has no wormholes."""
        import twnn_plugin as tw

        try:
            records = tw.report(model)
        except tw.AttachError:  # no wormholes: an ordinary model
            return
        for record in records:
            is_open = record.gate > 0
            converged = record.status[is_open] == int(tw.Status.converged)
            values = (
                is_open.numel(),
                is_open.sum(),
                record.steps[is_open].sum(),
                converged.sum(),
                record.evaluations,
                record.multiply_adds,
            )
            self.sums += torch.tensor([float(value) for value in values], dtype=torch.float64)

    def figures(self) -> dict[str, Any]:
        """The wormhole fields of an :class:`~zoo.evaluate.EvalResult`; empty without wormholes."""
        pairs, opened, steps, converged, rows, multiply_adds = self.sums.tolist()
        if not pairs:
            return {}
        return {
            "open_share": opened / pairs,
            "mean_steps": steps / opened if opened else None,
            "converged_share": converged / opened if opened else None,
            "rows_evaluated": int(rows),
            "multiply_adds": int(multiply_adds),
        }
