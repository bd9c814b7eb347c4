"""Whether ``torch.func`` or forward-mode AD is at work."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["active"]


def active() -> bool:
    """Whether tensors may carry more than ``.backward()`` knows: a functorch level or a tangent."""
    # torch has no public question for either; its own autograd.Function asks the first one this way.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
