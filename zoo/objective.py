"""What training minimises, as one module, so that DistributedDataParallel sees the whole loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.selection import Reward, closed_loss, policy_loss, selection_of

__all__ = ["Objective", "auxiliary_loss"]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """The scalar that ``model.auxiliary_loss()`` returns for its last forward pass; ``None`` without one."""
    method: Any = getattr(model, "auxiliary_loss", None)
    return None if method is None else method()


class Objective(nn.Module):
    """Cross-entropy of a model's logits, plus what else the model asks for.

    That is its own auxiliary loss, if it has one, the weighted cross-entropy of its closed head, if it
    has one (:func:`twnn_plugin.closed_loss`), and, where a policy picks its layers, the policy's loss
    (:func:`twnn_plugin.selection.policy_loss`) and that of the prediction before anything is iterated.

    Args:
        model: maps images (B, C, H, W) to logits (B, K), or tokens (B, T) to logits (B, K) or (B, K, T).
        smoothing: label smoothing of hard labels; soft targets come smoothed already.
        closed_weight: of the loss on the prediction before anything is iterated, for models with a selection.

    Attributes:
        reward: what the policy learns from; None: it does not learn now.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, closed_weight: float = 0.0):
        super().__init__()
        self.model = model
        self.smoothing, self.closed_weight = smoothing, closed_weight
        self.reward: Reward | None = None

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets to total loss, auxiliary loss and logits.

        Args:
            images: (B, C, H, W), or (B, T) tokens.
            targets: (B,) labels, (B, K) shares of labels, or (B, T) next tokens.
        """
        logits = self.model(images)
        loss = self._cross_entropy(logits, targets)
        terms = [auxiliary_loss(self.model), tw.closed_loss(self.model, self._cross_entropy, targets)]
        terms += self._selection_terms(logits, targets)
        extra = sum([term for term in terms if term is not None], torch.zeros_like(loss))
        return loss + extra, extra, logits

    def _selection_terms(self, logits: Tensor, targets: Tensor) -> list[Tensor | None]:
        selection = selection_of(self.model)
        if selection is None or selection.last is None:
            return []
        terms = [selection.auxiliary_loss()]
        if self.reward is not None:
            terms.append(policy_loss(selection.last, logits, targets, self.reward))
        if self.closed_weight:
            terms.append(
                closed_loss(selection.last, targets, self.closed_weight, self._smoothing_of(targets))
            )
        return terms

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self._smoothing_of(targets))

    def _smoothing_of(self, targets: Tensor) -> float:
        return 0.0 if targets.is_floating_point() else self.smoothing
