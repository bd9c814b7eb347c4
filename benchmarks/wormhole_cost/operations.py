"""Counting the operations of a pass, and the times that the host waits for a value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["operations"]


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """ATen operations of a pass without gradients, views included; and those that give the host a value."""
    with torch.no_grad(), _Counting() as counting:
        model(images)
    return counting.calls, counting.waits
