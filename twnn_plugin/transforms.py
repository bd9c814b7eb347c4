"""Whether ``torch.func`` or forward-mode AD is at work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["active", "wraps"]


def active() -> bool:
    """Whether tensors may carry more than ``.backward()`` knows: a functorch level or a tangent."""
    # torch has no public question for either; its own autograd.Function asks the first one this way.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wraps(*values: object) -> bool:
    """Whether one of them is a tensor that means something only while ``torch.func`` is at work."""
    if not torch._C._are_functorch_transforms_active():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(isinstance(x, Tensor) and wrapped(x) for x in values)
