"""What a gate makes of activations, in one call: most of what a closed wormhole costs are calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import transforms
from .switch import available, library

__all__ = ["Glance", "Told"]

_EPS = 1e-5  # of layer_norm


class Told(NamedTuple):
    """Scores of which none is above the threshold; a tensor is made of them when somebody asks.

    Attributes:
        numbers: (B, 1 or C) float32.
        scores: 1 or C.
        threshold: it.
    """

    numbers: bytearray
    scores: int
    threshold: float

    def tensor(self) -> Tensor:
        """(B, 1 or C) the scores."""
        return torch.frombuffer(self.numbers, dtype=torch.float32).view(-1, self.scores)


class _Known(NamedTuple):
    """Layers and numbers of a gate as the kernel has them.

    Attributes:
        arrays: weight and bias of both layers, threshold, mean and variance.
        addresses: where each has its numbers.
        sizes: how many numbers both weights have.
        channels: of the activations.
        scores: of a row.
        job: what the kernel is told of them.
    """

    arrays: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    sizes: tuple[int, int]
    channels: int
    scores: int
    job: bytes


class Glance:
    """``score(leaky_relu(hidden(standard)))``, where nothing of it is above a threshold.

    ``standard`` is ``(layer_norm(features) - mean) / sqrt(variance + least)``. Where the weights lie is
    found out once and noted; copies and pickles begin anew.

    Args:
        least: positive.
        slope: of the hidden units below zero.
    """

    def __init__(self, least: float, slope: float):
        self.least, self.slope = least, slope
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.least, self.slope)

    def __call__(
        self,
        out: Tensor,
        layout: str,
        hidden: nn.Module,
        score: nn.Module,
        threshold: Tensor,
        mean: Tensor,
        variance: Tensor,
    ) -> tuple[Told | None] | None:
        """The scores of activations.

        Args:
            out: (B, ...) activations. The features are the means over their C positions or, for layers twice
                as wide, means and maxima, of which each are layer-normalised by themselves.
            layout: of their axes, ``"NC"``, ``"NLC"``, ``"NHWC"`` or ``"NCHW"``.
            hidden: the first layer, of C or 2 C features.
            score: the second one, of one score or C.
            threshold: a number.
            mean: (C,) or (2 C,).
            variance: the same.

        Returns:
            The scores; (None,) if one is above the threshold, or no number; None where the kernel has no way
            to tell: gradients or a graph are recorded, or something is not in float32, on the CPU, in plain
            layers.
        """
        # Behind a network everything that is asked is far from the processor: few questions, none twice.
        if not available() or type(out) is not Tensor or out.dtype is not torch.float32 or not out.is_cpu:
            return None
        if (
            torch.is_grad_enabled()
            or out.is_neg()
            or transforms.wraps(out)
            or torch.compiler.is_dynamo_compiling()
            or torch.jit.is_tracing()
            or type(hidden) is not nn.Linear
            or type(score) is not nn.Linear
        ):
            return None
        one, other = hidden._parameters, score._parameters  # a fifth of the time that the attributes take
        found: tuple[Any, ...] = (
            *(one.get("weight"), one.get("bias"), other.get("weight"), other.get("bias")),
            *(threshold, mean, variance),
        )
        shape, size = out.shape, out.numel()
        channels = shape[1 if layout == "NCHW" else -1]
        if not size:
            return None
        known = self._known
        if known is None or known.channels != channels or not _same(known, found):
            known = self._known = self._look(channels, found)
            if known is None:
                return None
        rows = shape[0]
        if layout != "NCHW":
            contiguous, per_channel, per_position = out.is_contiguous(), 1, channels
        elif out.is_contiguous():
            contiguous, per_channel, per_position = True, size // (rows * channels), 1
        else:
            contiguous = out.is_contiguous(memory_format=torch.channels_last)
            per_channel, per_position = 1, channels
        if not contiguous:
            return None
        assert library is not None
        told = library.glance(
            known.job, rows, size // (rows * channels), per_channel, per_position, out.data_ptr()
        )
        return (None,) if told is None else (Told(told[0], known.scores, told[1]),)

    def _look(self, channels: int, arrays: tuple[Any, ...]) -> _Known | None:
        """What the kernel has to know; None: the layers are no plain ones, or of other activations."""
        for array in arrays[:4]:
            if type(array) is not nn.Parameter:
                return None
        for array in arrays:
            if array.dtype is not torch.float32 or not array.is_cpu or not array.is_contiguous():
                return None
        (inner, width), scores = arrays[0].shape, arrays[2].shape[0]
        parts = 2 if width == 2 * channels else 1
        if width != parts * channels:
            return None
        addresses = tuple(array.data_ptr() for array in arrays)
        assert library is not None
        job = library.glance_settings(
            channels, parts, inner, scores, *addresses, _EPS, self.least, self.slope
        )
        return _Known(arrays, addresses, (inner * width, scores * inner), channels, scores, job)


def _same(known: _Known, arrays: tuple[Any, ...]) -> bool:
    """Whether arrays are those that are known, and where they were: what else is known still holds."""
    for array, before, address in zip(arrays, known.arrays, known.addresses):  # noqa: B905 - seven of each
        if array is not before or array.data_ptr() != address or array.dtype is not torch.float32:
            return False
    first, _, second, *_ = arrays  # the others have one axis
    if not first.is_contiguous() or not second.is_contiguous():
        return False
    return first.numel() == known.sizes[0] and second.numel() == known.sizes[1]
