"""A copy of a model on the meta device: its shapes and its dataflow without its arithmetic."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["shadow"]


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are on the meta device.

    The weights are not copied, and nothing that a pass of the copy leaves behind (cached masks or
    positions) gets into the model.

    Raises:
        Exception: whatever the model's own parts raise when they are copied.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
