"""Writing to memory that is free again, where no derivative needs what it held.

On the CPU the allocation of a wide state costs about as much as a pass over it: its pages are handed
back to the system and mapped anew.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["difference", "free_to_write"]


def free_to_write(x: Tensor) -> bool:
    """Whether results computed from ``x`` carry no derivative, backward or forward."""
    if torch.is_grad_enabled() or x.requires_grad:
        return False
    return forward_ad.unpack_dual(x).tangent is None


def difference(a: Tensor, b: Tensor, memory: Tensor | None) -> Tensor:
    """``a - b``, written to ``memory`` if there is any."""
    return a - b if memory is None else torch.sub(a, b, out=memory)
