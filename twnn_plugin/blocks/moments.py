"""Mean and variance of what a batch normalisation sees, over all processes where it shares them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["moments"]


def moments(norm: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean of a (B, C, ...) input for each channel, with their graph.

    For ``SyncBatchNorm`` those of the joined batch: one collective here and one when the gradient passes,
    in every process alike.

    Args:
        norm: the normalisation.
        value: its input.
    """
    axes = [0, *range(2, value.dim())]
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    var, mean = torch.var_mean(value, dim=axes, correction=0)
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return var, mean
    group = norm.process_group
    size = dist.get_world_size(group)
    if size == 1:
        return var, mean
    count = mean.new_full((1,), value.numel() / value.shape[1])
    # Each process fills its own line of a table; their sum is what all have measured.
    table = torch.zeros(size, 2 * mean.numel() + 1, dtype=mean.dtype, device=mean.device)
    table = table.index_copy(
        0, torch.tensor([dist.get_rank(group)], device=mean.device), torch.cat([var, mean, count])[None]
    )
    whole = _Sum.apply(table, group)
    assert isinstance(whole, Tensor)
    variances, means, counts = whole.split([mean.numel(), mean.numel(), 1], dim=1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(dim=0)
    return (shares * (variances + (means - mean).square())).sum(dim=0), mean


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient is the sum of what all of them send back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
