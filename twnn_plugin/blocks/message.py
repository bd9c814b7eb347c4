"""The way back through a wormhole: from a span's output to the shape of its input."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..constraints import contractive

__all__ = ["LAYOUTS", "BallNorm", "Message", "layout_of", "maxima", "pool"]

LAYOUTS = {"NC": 1, "NCHW": 1, "NHWC": -1, "NLC": -1}
"""Where the channels are in each layout that a message understands."""


def layout_of(value: Tensor, channels_last: bool = False) -> str:
    """The layout of an activation: (B, C), (B, L, C), and (B, C, H, W) or (B, H, W, C).

    Raises:
        ValueError: a number of axes that is none of these.
    """
    layouts = {2: "NC", 3: "NLC", 4: "NHWC" if channels_last else "NCHW"}
    if value.dim() not in layouts:
        raise ValueError(f"A wormhole carries activations of 2 to 4 axes; got shape {tuple(value.shape)}.")
    return layouts[value.dim()]


def pool(value: Tensor, layout: str, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C) means over positions, computed in ``dtype``; None: in the activation's own."""
    if layout == "NC":
        return value if dtype is None else value.to(dtype)
    if layout == "NCHW":
        return value.mean(dim=(2, 3), dtype=dtype)
    return value.flatten(1, -2).mean(dim=1, dtype=dtype)


def maxima(value: Tensor, layout: str, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C) maxima over positions, in ``dtype``; None: in the activation's own."""
    if layout == "NC":
        found = value
    else:
        found = value.amax(dim=(2, 3)) if layout == "NCHW" else value.flatten(1, -2).amax(dim=1)
    return found if dtype is None else found.to(dtype)


class BallNorm(nn.Module):
    """States longer than ``sqrt(D)``, those of rms above 1, are brought back to it; shorter ones stay.

    The projection onto a ball, which moves no two states apart (it is nonexpansive, like every projection
    onto a convex set), while group normalisation has no Lipschitz constant: near a state of variance zero it
    expands without bound.
    """

    def forward(self, state: Tensor) -> Tensor:
        """(b, ...) to the same shape."""
        flat = state.flatten(1)
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        # Of squares, not of a norm, whose gradient at zero is not finite.
        square = wide.square().mean(dim=1, keepdim=True).clamp_min(1.0)
        return (wide * torch.rsqrt(square)).to(flat.dtype).view_as(state)


class Message(nn.Module):
    """Normalise, project the channels, resize: (state) -> what is added to the span's input.

    Group normalisation with one group bounds the message whatever the state's size; a scale per
    channel, small at first, keeps a freshly opened wormhole close to the plain network.

    With ``contraction``, the message is Lipschitz with that constant, in the l2 norm over all channels and
    positions: the normalisation is :class:`BallNorm` (constant 1), the projection is held to norm 1 by
    :func:`twnn_plugin.contractive`, no channel's scale exceeds the constant (all are divided by the excess
    of the largest), and a resizing that lengthens (one to more positions) is divided by its norm. A gate in
    [0, 1] does not add to it. What the guarantee does not cover is the span: ``z = span(entry + message(z))``
    is a contraction if the constant of the span times this one is below 1.

    Args:
        source: layout of the state, see :data:`LAYOUTS`.
        target: layout of the span's input.
        in_channels: channels of the state.
        out_channels: channels of the span's input.
        scale: initial value of the scale.
        contraction: a bound on the message's Lipschitz constant, > 0; None: none.
        path: a module that the state goes through first, from a state to one of the same shape.
    """

    def __init__(
        self,
        source: str,
        target: str,
        in_channels: int,
        out_channels: int,
        scale: float = 0.1,
        contraction: float | None = None,
        path: nn.Module | None = None,
    ):
        super().__init__()
        # A number's own arithmetic: under a default device without values there are no tensors to ask.
        known = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not known or not math.isfinite(scale) or scale == 0:
            raise ValueError(
                f"A message's scale must be a finite number, not zero, or nothing is learnt; got {scale!r}."
            )
        self.source, self.target, self.contraction = source, target, contraction
        self.path = path
        self.norm = nn.GroupNorm(1, in_channels) if contraction is None else BallNorm()
        self.project = nn.Linear(in_channels, out_channels, bias=False)
        if contraction is not None:
            contractive(self.project, 1.0)
        self.scale = nn.Parameter(torch.full((out_channels,), float(scale)))

    def weight(self) -> Tensor:
        """(out_channels, in_channels) projection and scale in one, constrained; made once a solve."""
        scale = self.scale
        if self.contraction is not None:
            scale = scale * (self.contraction / scale.abs().amax().clamp_min(self.contraction))
        weight: Any = self.project.weight
        if not isinstance(weight, Tensor):  # a quantised layer's is a method
            weight = weight().dequantize()
        return weight * scale[:, None]

    def forward(self, state: Tensor, size: torch.Size, weight: Tensor | None = None) -> Tensor:
        """The message for an input of shape ``size`` (batch first).

        Args:
            state: (b, ...) in the source's layout.
            size: of the span's input.
            weight: what :meth:`weight` gave; None: made anew.
        """
        weight = self.weight() if weight is None else weight
        state = state if self.path is None else self.path(state)
        value = self._sent(state, size, weight)
        if self.contraction is None:
            return value
        longer = self._stretch(tuple(state.shape[1:]), tuple(size[1:]))
        return value / longer if longer > 1 else value

    def _sent(self, state: Tensor, size: torch.Size, weight: Tensor) -> Tensor:
        if self.source == "NC":
            value = F.linear(self.norm(state), weight)
            return value if self.target == "NC" else self._spread(value, size)
        # Normalised as a grid: group normalisation wants the channels first.
        value = F.conv2d(self.norm(self._to_grid(state)), weight[:, :, None, None])
        return self._from_grid(value, size)

    def _stretch(self, state: tuple[int, ...], target: tuple[int, ...]) -> float:
        """The l2 norm of the resizing: by axis, since it is separable."""
        here, there = _positions(state, self.source), _positions(target, self.target)
        if not here:
            return math.prod(there) ** 0.5
        if not there:
            return math.prod(here) ** -0.5
        if self.target == "NLC":
            return _resize_norm(math.prod(here), there[0], False)
        here = here if len(here) == 2 else (here[0], 1)
        pooled = here[0] > there[0] or here[1] > there[1]
        return _resize_norm(here[0], there[0], pooled) * _resize_norm(here[1], there[1], pooled)

    def scaled(self, value: Tensor, amount: Tensor) -> Tensor:
        """A message times ``amount``, (b,) or, channel by channel, (b, C)."""
        if amount.dim() == 1:
            return value * amount.view(-1, *[1] * (value.dim() - 1)).to(value.dtype)
        shape = [1] * value.dim()
        shape[0], shape[LAYOUTS[self.target]] = amount.shape
        return value * amount.view(shape).to(value.dtype)

    def _to_grid(self, state: Tensor) -> Tensor:
        if self.source == "NHWC":
            return state.permute(0, 3, 1, 2)
        if self.source == "NLC":
            return state.transpose(1, 2).unsqueeze(-1)
        return state

    def _spread(self, value: Tensor, size: torch.Size) -> Tensor:
        axis = LAYOUTS[self.target] % len(size)
        shape = [size[0] if i == 0 else (value.shape[1] if i == axis else 1) for i in range(len(size))]
        return value.view(shape).expand(size)

    def _from_grid(self, value: Tensor, size: torch.Size) -> Tensor:
        if self.target == "NC":
            return value.mean(dim=(2, 3))
        if self.target == "NLC":
            tokens = value.flatten(2).transpose(1, 2)
            return tokens if tokens.shape[1] == size[1] else _resize_tokens(tokens, size[1])
        grid = size[2:] if self.target == "NCHW" else size[1:3]
        value = _resize(value, (int(grid[0]), int(grid[1])))
        return value if self.target == "NCHW" else value.permute(0, 2, 3, 1)


def _positions(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The sizes of an activation's axes but for batch and channels."""
    sizes = () if layout == "NC" else shape[1:] if layout == "NCHW" else shape[:-1]
    # A size that torch.compile holds for a symbol becomes the number that it is here.
    return tuple([index(size) for size in sizes])


@torch.compiler.assume_constant_result
def _resize_norm(here: int, there: int, pooled: bool) -> float:
    """The largest singular value of resizing one axis: in a compiled graph a constant."""
    return _known_resize_norm(here, there, pooled)


@lru_cache(maxsize=256)
def _known_resize_norm(here: int, there: int, pooled: bool) -> float:
    """The largest singular value of the resizing's matrix.

    By numbers alone: where a program is traced, or under a default device without values, a tensor made here
    has none to read.
    """
    if here == there:
        return 1.0
    rows = (_averages if pooled else _between)(here, there)
    # Neighbours alone overlap: outputs where many positions become one, inputs where one becomes many. The
    # products of these, whose largest eigenvalue is the square, make a matrix of three diagonals.
    if pooled and here > there:
        main = [sum(w * w for w in weights) for _, weights in rows]
        side = [
            weights[0] * after[0] * max(0, start + len(weights) - then)
            for (start, weights), (then, after) in pairwise(rows)
        ]
    else:
        main, side = [0.0] * here, [0.0] * (here - 1)
        for start, weights in rows:
            for place, w in enumerate(weights):
                main[start + place] += w * w
            if len(weights) == 2:
                side[start] += weights[0] * weights[1]
    return _largest_eigenvalue(main, side) ** 0.5 * (1 + 1e-6)


def _averages(here: int, there: int) -> list[tuple[int, list[float]]]:
    """Adaptive average pooling of an axis: for each output the first position and the weights from there."""
    ends = [(i * here // there, -(-(i + 1) * here // there)) for i in range(there)]
    return [(start, [1 / (end - start)] * (end - start)) for start, end in ends]


def _between(here: int, there: int) -> list[tuple[int, list[float]]]:
    """Linear interpolation of an axis, ``align_corners=False``, likewise."""
    places = [max((i + 0.5) * here / there - 0.5, 0.0) for i in range(there)]
    split = [(int(place), place - int(place)) for place in places]
    return [(low, [1 - part, part] if low + 1 < here else [1.0]) for low, part in split]


def _largest_eigenvalue(main: list[float], side: list[float]) -> float:
    """Of a symmetric matrix with these diagonals, not below zero, by bisection (Golub & Van Loan, 8.4)."""
    squares = [0.0, *(s * s for s in side)]
    low, high = 0.0, max(main) + 2 * max(side, default=0.0)
    for _ in range(60):
        middle, pivot = (low + high) / 2, 1.0
        for m, square in zip(main, squares, strict=True):
            pivot = middle - m - square / pivot
            if pivot <= 0:  # some eigenvalue is above
                low = middle
                break
        else:
            high = middle
    return high


def _resize(value: Tensor, grid: tuple[int, int]) -> Tensor:
    here = (value.shape[2], value.shape[3])
    if here == grid:
        return value
    if here[0] > grid[0] or here[1] > grid[1]:
        return F.adaptive_avg_pool2d(value, grid)
    return F.interpolate(value, size=grid, mode="bilinear", align_corners=False)


def _resize_tokens(tokens: Tensor, length: int) -> Tensor:
    return F.interpolate(tokens.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
