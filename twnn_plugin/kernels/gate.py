"""What a gate makes of activations, in one call: most of what a closed wormhole costs are calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from .switch import available, library

__all__ = ["glance"]

_EPS = 1e-5  # of layer_norm


def glance(
    out: Tensor,
    layout: str,
    hidden: nn.Module,
    score: nn.Module,
    threshold: Tensor,
    mean: Tensor,
    variance: Tensor,
    least: float,
    slope: float,
) -> tuple[Tensor, float | None] | None:
    """``score(leaky_relu(hidden(standard)))``, and the threshold if nothing is above it (NaN is).

    ``standard`` is ``(layer_norm(features) - mean) / sqrt(variance + least)``.

    Args:
        out: (B, ...) activations. The features are the means over their C positions or, for layers twice as
            wide, means and maxima, of which each are layer-normalised by themselves.
        layout: of their axes, ``"NC"``, ``"NLC"``, ``"NHWC"`` or ``"NCHW"``.
        hidden: the first layer, of C or 2 C features.
        score: the second one.
        threshold: a number.
        mean: (C,) or (2 C,).
        variance: the same.
        least: positive.
        slope: of the hidden units below zero.

    Returns:
        (B, 1 or C) scores and the threshold, or None for it; None where the kernel has no way to tell:
        gradients or a graph are recorded, or something is not in float32, on the CPU, in plain layers.
    """
    # Behind a network everything that is asked is far from the processor: few questions, none of them twice.
    if not available() or type(out) is not Tensor or out.dtype is not torch.float32 or not out.is_cpu:
        return None
    if (
        torch.is_grad_enabled()
        or out.is_neg()
        or transforms.wraps(out)
        or torch.compiler.is_dynamo_compiling()
        or torch.jit.is_tracing()
    ):
        return None
    arrays, size = _arrays(hidden, score, threshold, mean, variance), out.numel()
    if arrays is None or not size:
        return None
    rows, (inner, width), scores = out.shape[0], arrays[0].shape, arrays[2].shape[0]
    channels = out.shape[1 if layout == "NCHW" else -1]
    parts = 2 if width == 2 * channels else 1
    if layout != "NCHW":
        contiguous, per_channel, per_position = out.is_contiguous(), 1, channels
    elif out.is_contiguous():
        contiguous, per_channel, per_position = True, size // (rows * channels), 1
    else:
        contiguous = out.is_contiguous(memory_format=torch.channels_last)
        per_channel, per_position = 1, channels
    if not contiguous or width != parts * channels:
        return None
    found = out.new_empty((rows, scores))
    assert library is not None
    over = library.glance(
        rows,
        channels,
        size // (rows * channels),
        parts,
        inner,
        scores,
        per_channel,
        per_position,
        out.data_ptr(),
        *[array.data_ptr() for array in arrays],
        found.data_ptr(),
        _EPS,
        least,
        slope,
    )
    return found, over


def _arrays(hidden: nn.Module, score: nn.Module, *others: Tensor) -> tuple[Tensor, ...] | None:
    """Weights and biases of both layers, and the others; None: they are no plain ones."""
    if type(hidden) is not nn.Linear or type(score) is not nn.Linear:
        return None
    one, other = hidden._parameters, score._parameters  # a fifth of the time that the attributes take
    found: tuple[Any, ...] = (one.get("weight"), one.get("bias"), other.get("weight"), other.get("bias"))
    for array in found:
        if type(array) is not nn.Parameter:
            return None
    found = (*found, *others)
    for array in found:
        if array.dtype is not torch.float32 or not array.is_cpu or not array.is_contiguous():
            return None
    return found
