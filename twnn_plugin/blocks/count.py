"""Multiply-adds of one row's replay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .feedback import Feedback, Replay
from .settle import GroupReplay

__all__ = ["group_multiply_adds", "multiply_adds"]


def _attention(*arguments: Any, **_: Any) -> int:
    """Two operations for each multiply-add of ``softmax(query key^T) value``, from the three shapes."""
    (batch, heads, queries, width), key, value = arguments[:3]
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward(*arguments: Any, **_: Any) -> int:
    """The scores again, and the gradients of scores, queries, keys and values; first comes the gradient."""
    (batch, heads, queries, width), key, value = arguments[1:4]
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


# torch 2.11 has no formula for attention on the CPU, which it would leave out.
for _operation, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
):
    with suppress(RuntimeError):  # torch has one
        register_flop_formula(_operation)(_formula)


def multiply_adds(feedback: Feedback, replay: Replay, parts: Sequence[nn.Module]) -> int:
    """Multiply-adds of one evaluation of the span's map for one row, as of its last input's shape.

    Args:
        feedback: the wormhole.
        replay: its span as a function.
        parts: the modules of the span, to be put into eval mode meanwhile.
    """

    def one(entry: Tensor, signals: tuple[Tensor], *constants: Tensor) -> tuple[Tensor]:
        return (replay(entry + signals[0], *constants),)

    return group_multiply_adds((feedback,), one, parts)


def group_multiply_adds(
    feedbacks: Sequence[Feedback], replay: GroupReplay, parts: Sequence[nn.Module]
) -> int:
    """Multiply-adds of one evaluation of a group's map for one row, as of its last input's shape.

    Counted by running it once on zeros in eval mode: matrix products, convolutions and attention,
    the messages included; normalisations and activations are not counted.

    Args:
        feedbacks: the wormholes of the group.
        replay: the union of their spans as a function.
        parts: the modules of the spans, to be put into eval mode meanwhile.
    """
    # In the weights' own dtype: the pass may have run under autocast, and this does not.
    like = feedbacks[0].message.scale.detach()
    assert feedbacks[0].shapes is not None
    _, _, constants, entry = feedbacks[0].shapes
    constants = [c.to(like.dtype) if c.is_floating_point() else c for c in constants]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    counter = FlopCounterMode(display=False)
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), counter:
            signals = tuple(_signal(feedback, like) for feedback in feedbacks)
            replay(like.new_zeros(1, *entry), signals, *constants)
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops() // 2


def _signal(feedback: Feedback, like: Tensor) -> Any:
    assert feedback.shapes is not None
    entry, out = feedback.shapes[:2]
    return feedback.message(like.new_zeros(1, *out), torch.Size((1, *entry)))
