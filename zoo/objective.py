"""What training minimises, as one module, so that DistributedDataParallel sees the whole loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twnn_plugin as tw

__all__ = ["Objective", "auxiliary_loss"]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The scalar that ``model.auxiliary_loss()`` returns for its last forward pass; ``None`` without one."""
    method: Any = getattr(model, "auxiliary_loss", None)
    return None if method is None else method()


class Objective(nn.Module):
    """Cross-entropy of a model's logits, plus what else the model asks for.

    That is its own auxiliary loss, if it has one, and the weighted cross-entropy of its closed head, if it
    has one (:func:`twnn_plugin.closed_loss`).

    Args:
        model: maps images (B, C, H, W) to logits (B, K).
        smoothing: label smoothing of hard labels; soft targets come smoothed already.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing = smoothing

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) and targets (B,) or (B, K) to total loss, auxiliary loss and logits (B, K)."""
        logits = self.model(images)
        loss = self._cross_entropy(logits, targets)
        terms = [auxiliary_loss(self.model), tw.closed_loss(self.model, self._cross_entropy, targets)]
        extra = sum([term for term in terms if term is not None], torch.zeros_like(loss))
        return loss + extra, extra, logits

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.ndim == 2 else self.smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
