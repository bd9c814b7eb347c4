"""What a gate makes of activations, in one call: most of what a closed wormhole costs are calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .switch import available, library

__all__ = ["Perceptron", "glance"]

_EPS = 1e-5  # of layer_norm


class Perceptron(NamedTuple):
    """``score(relu(hidden(layer_norm(features))))``, and what the scores are compared with."""

    hidden: nn.Module
    score: nn.Module
    threshold: Tensor  # a number


def glance(out: Tensor, layout: str, gate: Perceptron) -> tuple[Tensor, float | None] | None:
    """The scores of activations, and the threshold if none is above it (one that is not a number is).

    Args:
        out: (B, ...) activations.
        layout: of their axes, ``"NC"``, ``"NLC"``, ``"NHWC"`` or ``"NCHW"``.
        gate: its layers.

    Returns:
        (B, 1 or C) scores and the threshold, or None for it; None where the kernel has no way to tell:
        gradients or a graph are recorded, or something is not in float32, on the CPU, in plain layers.
    """
    if not available() or type(out) is not Tensor or out.dtype is not torch.float32 or not out.numel():
        return None
    if not out.is_cpu or out.is_neg() or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    steps = _steps(out, layout)
    arrays = _arrays(gate)
    if steps is None or arrays is None or torch.jit.is_tracing():
        return None
    rows, (hidden, channels), scores = out.shape[0], arrays[0].shape, arrays[2].shape[0]
    per_channel, per_position = steps
    if channels * rows == 0 or out.numel() % (rows * channels):
        return None
    score = out.new_empty((rows, scores))
    assert library is not None
    threshold = library.glance(
        rows,
        channels,
        out.numel() // (rows * channels),
        hidden,
        scores,
        per_channel,
        per_position,
        out.data_ptr(),
        *(array.data_ptr() for array in arrays),
        score.data_ptr(),
        _EPS,
    )
    return score, threshold


def _steps(out: Tensor, layout: str) -> tuple[int, int] | None:
    """From one channel and one position to the next, in memory; None: not in these."""
    if layout != "NCHW":
        return (1, out.shape[-1]) if out.is_contiguous() else None
    if out.is_contiguous():
        return out.shape[2] * out.shape[3], 1
    return (1, out.shape[1]) if out.is_contiguous(memory_format=torch.channels_last) else None


def _arrays(gate: Perceptron) -> tuple[Tensor, ...] | None:
    """Weights and biases of both layers, and the threshold; None: they are no plain ones."""
    found = []
    for layer in (gate.hidden, gate.score):
        if type(layer) is not nn.Linear:
            return None
        own = layer._parameters  # a fifth of the time that the attributes take
        found += [own.get("weight"), own.get("bias")]
    for array in found:
        if type(array) is not nn.Parameter:
            return None
    found.append(gate.threshold)
    for array in found:
        if array.dtype is not torch.float32 or not array.is_cpu or not array.is_contiguous():
            return None
    return tuple(found)
