"""Multiply-adds of one row's replay."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .feedback import Feedback, Replay
from .settle import GroupReplay

__all__ = ["counting", "group_multiply_adds", "multiply_adds"]


def _attention(*arguments: Any, **_: Any) -> int:
    """Two operations for each multiply-add of ``softmax(query key^T) value``, from the three shapes."""
    (batch, heads, queries, width), key, value = arguments[:3]
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward(*arguments: Any, **_: Any) -> int:
    """The scores again, and the gradients of scores, queries, keys and values; first comes the gradient."""
    (batch, heads, queries, width), key, value = arguments[1:4]
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


def _recurrent(*arguments: Any, **_: Any) -> int:
    """Two operations for each weight of a recurrent layer and each time step of each row.

    What one direction of one layer is given: input (T, B, C) or packed (N, C), then its two matrices.
    """
    steps, *weights = arguments[:3]
    return _at_each_step(steps, weights)


def _recurrent_all(*arguments: Any, **_: Any) -> int:
    """The same for all layers and directions in one call: the weights and biases come as one list.

    What a layer is given by the one before it has as many steps as the input.
    """
    return _at_each_step(*arguments[:2])


def _recurrent_backward(*arguments: Any, **_: Any) -> int:
    """The gradients of inputs, states and weights: oneDNN computes all of them, asked for or not."""
    return 2 * _recurrent(*arguments)


def _recurrent_all_backward(*arguments: Any, **_: Any) -> int:
    """The gradients of inputs and states, and those of the weights if the last of the mask says so."""
    return (1 + arguments[-1][-1]) * _recurrent_all(*arguments)


def _at_each_step(steps: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    # Biases have one axis. So a projection, which is one more matrix, is counted, too.
    return 2 * math.prod(steps[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


# torch 2.11 has no formula for attention on the CPU, and up to 2.15 none has one for the fused kernels of
# recurrent layers: nn.LSTM on the CPU (oneDNN), all of them on a GPU (cuDNN, MIOpen). They would be left out.
# With these in its registry, whoever counts by torch's formulas counts them.
for _operation, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _attention),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
    (torch.ops.aten.mkldnn_rnn_layer, _recurrent),
    (torch.ops.aten.mkldnn_rnn_layer_backward, _recurrent_backward),
    (torch.ops.aten._cudnn_rnn, _recurrent_all),
    (torch.ops.aten._cudnn_rnn_backward, _recurrent_all_backward),
    (torch.ops.aten.miopen_rnn, _recurrent_all),
    (torch.ops.aten.miopen_rnn_backward, _recurrent_all_backward),
):
    with suppress(RuntimeError):  # torch has one
        register_flop_formula(_operation)(_formula)


class _Everywhere:
    """In place of the counter's look at which module an operation belongs to."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """torch's counter of operations, for all of them together and without gradients.

    To tell modules apart it asks for the graph of what each is given, and stops where that is a view of a
    weight, such as a class token for each sample: without gradients that wants one and has none.
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    with counter:
        yield counter


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

    Counted by running it once on zeros in eval mode: matrix products, convolutions, attention and recurrent
    layers, the messages included; normalisations and activations are not counted.

    Args:
        feedbacks: the wormholes of the group.
        replay: the union of their spans as a function.
        parts: the modules of the spans, to be put into eval mode meanwhile.
    """
    assert feedbacks[0].shapes is not None
    _, _, constants, entry = feedbacks[0].shapes
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), _whole([*parts, *feedbacks]), counting() as counter:
            # In the weights' own dtype: the pass may have run under autocast, and this does not.
            like = feedbacks[0].message.scale.detach()
            constants = [c.to(like.dtype) if c.is_floating_point() else c for c in constants]
            signals = tuple(_signal(feedback, like) for feedback in feedbacks)
            replay(like.new_zeros(1, *entry), signals, *constants)
    finally:
        for module, mode in modes:
            module.training = mode
    return counter.get_total_flops() // 2


@contextmanager
def _whole(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this, zeros stand for weights of which each process has a piece: what counts is shapes."""
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    pieces = [
        (module, name, weight)
        for part in modules
        for module in part.modules()
        for name, weight in module.named_parameters(recurse=False)
        if isinstance(weight, sharded)
    ]
    try:
        for module, name, weight in pieces:
            zeros = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        yield
    finally:
        for module, name, weight in pieces:
            module.register_parameter(name, weight)


def _signal(feedback: Feedback, like: Tensor) -> Any:
    assert feedback.shapes is not None
    entry, out = feedback.shapes[:2]
    return feedback.message(like.new_zeros(1, *out), torch.Size((1, *entry)))
