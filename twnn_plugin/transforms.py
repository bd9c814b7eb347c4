"""Whether ``torch.func``, forward-mode AD or an export is at work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "active",
    "constant",
    "dead",
    "depth",
    "exporting",
    "level_of",
    "many",
    "stripped",
    "value_of",
    "wraps",
]


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether ``torch.export`` is at work; asked for real, since torch 2.11's compiler takes it for true."""
    return torch.compiler.is_exporting()


def active() -> bool:
    """Whether tensors may carry more than ``.backward()`` knows: a functorch level or a tangent."""
    # torch has no public question for either; its own autograd.Function asks the first one this way.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def depth() -> int:
    """How many transforms of ``torch.func`` are at work, one within the other."""
    if not torch._C._are_functorch_transforms_active():
        return 0
    level: Any = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return level or 0


def level_of(tensor: Tensor) -> int:
    """Which of the transforms that are at work has wrapped a tensor, counted from outside; 0: none."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.maybe_get_level(tensor) if wraps(tensor) else 0


def stripped(tensor: Tensor) -> Tensor:
    """What the outermost of the transforms has wrapped in a tensor; one that is not wrapped as it is."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.get_unwrapped(tensor) if wraps(tensor) else tensor


def wraps(*values: object) -> bool:
    """Whether one of them is a tensor that means something only while ``torch.func`` is at work."""
    if not torch._C._are_functorch_transforms_active():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(isinstance(x, Tensor) and wrapped(x) for x in values)


def dead(tensor: Tensor) -> bool:
    """Whether what wrapped a tensor is a transform that has ended, so that it has no numbers any more."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_dead_tensor_wrapper(tensor)


def constant(tensor: Tensor) -> bool:
    """Whether nothing is differentiated through a tensor, at any of the levels that are at work."""
    if tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None:
        return False
    if not wraps(tensor):
        return True
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    # What another level knows of it, only that level tells: the inner ones are asked without those around.
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    outermost = functorch.maybe_get_level(tensor) == functorch.maybe_current_level()
    with temporarily_pop_interpreter_stack():
        return constant(functorch.get_unwrapped(tensor) if outermost else tensor)


def many(tensor: Tensor) -> bool:
    """Whether ``vmap`` has many at once of what is seen as one tensor, so that no number can be looked at."""
    return wraps(tensor) and value_of(tensor) is None


def value_of(tensor: Tensor) -> Tensor | None:
    """The plain tensor of a tensor's value; None where there is none: ``vmap`` has many at once.

    What ``torch.func`` has made means nothing once it is done, and whoever keeps it could not be copied.
    """
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while wraps(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor  # as it is: an operation on it would be one of the transform again
