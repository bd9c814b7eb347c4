"""What a step may do besides computing: write to memory that is free again, look at numbers.

On the CPU the allocation of a wide state costs about as much as a pass over it: its pages are handed
back to the system and mapped anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["device_only", "difference", "free_to_look", "free_to_write", "to_unit"]

_device_only: ContextVar[bool] = ContextVar("device_only", default=False)


def free_to_write(x: Tensor) -> bool:
    """Whether results computed from ``x`` carry no derivative, backward or forward."""
    if torch.is_grad_enabled() or x.requires_grad:
        return False
    return forward_ad.unpack_dual(x).tangent is None


def difference(a: Tensor, b: Tensor, memory: Tensor | None) -> Tensor:
    """``a - b``, written to ``memory`` if there is any."""
    return a - b if memory is None else torch.sub(a, b, out=memory)


def to_unit(x: Tensor, length: Tensor, usable: Tensor) -> Tensor:
    """(b,) what makes the rows of ``x`` of length 1, zero if they are not usable; with all its derivatives.

    The derivative of a norm is no function that torch can differentiate in every nesting of transforms, and
    none at zero; that of the square of a vector that is nearly of length 1 already is.

    Args:
        x: (b, D).
        length: (b,) of its rows, without derivatives.
        usable: (b,) bool; the length is positive there.
    """
    inverse = usable / torch.where(usable, length, 1.0)
    x = x * inverse[:, None]
    return inverse * torch.where(usable, torch.linalg.vecdot(x, x), 1.0).rsqrt()


@contextmanager
def device_only() -> Iterator[None]:
    """Where every decision stays on the device, also if that is the CPU."""
    token = _device_only.set(True)
    try:
        yield
    finally:
        _device_only.reset(token)


def free_to_look(x: Tensor) -> bool:
    """Whether the host may look at numbers: on the CPU that costs less than to do without."""
    return x.device.type == "cpu" and not _device_only.get()
