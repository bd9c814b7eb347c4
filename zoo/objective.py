"""What training minimises, as one module, so that DistributedDataParallel sees the whole loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Objective", "auxiliary_loss"]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The scalar that ``model.auxiliary_loss()`` returns for its last forward pass; ``None`` without one."""
    method: Any = getattr(model, "auxiliary_loss", None)
    return None if method is None else method()


class Objective(nn.Module):
    """Cross-entropy of a model's logits, plus the model's own auxiliary loss if it has one.

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
        smoothing = 0.0 if targets.ndim == 2 else self.smoothing
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        extra = auxiliary_loss(self.model)
        if extra is None:
            return loss, torch.zeros_like(loss), logits
        return loss + extra, extra, logits
