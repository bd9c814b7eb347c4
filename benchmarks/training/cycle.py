"""The optimiser that every network of the comparisons is given: AdamW on one cycle of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["cycle", "one_cycle"]


def cycle(total: int, rising: float = 0.15, done: int = 0) -> Callable[[int], float]:
    """The factor of the learning rate: up over a share of the updates, and down on half a cosine.

    Args:
        total: updates.
        rising: the share, in (0, 1).
        done: updates made before the first one that is asked for.
    """
    top = max(1, round(rising * total))

    def factor(update: int) -> float:
        place = update + done
        if place < top:
            return (place + 1) / top
        return 0.5 * (1 + math.cos(math.pi * (place - top) / max(1, total - top)))

    return factor


def one_cycle(
    model: nn.Module, lr: float, weight_decay: float, total: int, rising: float = 0.15, done: int = 0
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW over all parameters that there are now, and its schedule.

    Args:
        model: what is trained.
        lr: highest learning rate.
        weight_decay: of matrices and kernels; vectors and scalars have none.
        total: updates.
        rising: share of them over which the rate rises.
        done: updates made already.
    """
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    return optimizer, LambdaLR(optimizer, cycle(total, rising, done))
