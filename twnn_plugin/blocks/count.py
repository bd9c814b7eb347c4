"""Multiply-adds of one row's replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .feedback import Feedback, Replay

__all__ = ["multiply_adds"]


def multiply_adds(feedback: Feedback, replay: Replay, parts: Sequence[nn.Module]) -> int:
    """Multiply-adds of one evaluation of the span's map for one row, as of its last input's shape.

    Counted by running it once on zeros in eval mode: matrix products, convolutions and attention,
    the message included; normalisations and activations are not counted.

    Args:
        feedback: the wormhole.
        replay: its span as a function.
        parts: the modules of the span, to be put into eval mode meanwhile.
    """
    assert feedback.shapes is not None
    entry_shape, out_shape, constants = feedback.shapes
    # In the weights' own dtype: the pass may have run under autocast, and this does not.
    like = feedback.message.scale.detach()
    entry, out = like.new_zeros(1, *entry_shape), like.new_zeros(1, *out_shape)
    constants = [c.to(like.dtype) if c.is_floating_point() else c for c in constants]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    counter = FlopCounterMode(display=False)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), counter:
            replay(entry + feedback.message(out, entry.shape), *constants)
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops() // 2
