"""The way back through a wormhole: from a span's output to the shape of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LAYOUTS", "Message", "layout_of", "pool"]

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


def pool(value: Tensor, layout: str) -> Tensor:
    """(B, C) means over positions."""
    if layout == "NC":
        return value
    return value.mean(dim=(2, 3)) if layout == "NCHW" else value.flatten(1, -2).mean(dim=1)


class Message(nn.Module):
    """Normalise, project the channels, resize: (state) -> what is added to the span's input.

    Group normalisation with one group bounds the message whatever the state's size; a scale per
    channel, small at first, keeps a freshly opened wormhole close to the plain network.

    Args:
        source: layout of the state, see :data:`LAYOUTS`.
        target: layout of the span's input.
        in_channels: channels of the state.
        out_channels: channels of the span's input.
        scale: initial value of the scale.
    """

    def __init__(self, source: str, target: str, in_channels: int, out_channels: int, scale: float = 0.1):
        super().__init__()
        if not torch.isfinite(torch.tensor(scale)) or scale == 0:
            raise ValueError(
                f"A message's scale must be finite and not zero, or nothing is learnt; got {scale!r}."
            )
        self.source, self.target = source, target
        self.norm = nn.GroupNorm(1, in_channels)
        self.project = nn.Linear(in_channels, out_channels, bias=False)
        self.scale = nn.Parameter(torch.full((out_channels,), scale))

    def forward(self, state: Tensor, size: torch.Size) -> Tensor:
        """The message for an input of shape ``size`` (batch first)."""
        if self.source == "NC":
            value = self.project(self.norm(state)) * self.scale
            return value if self.target == "NC" else self._spread(value, size)
        grid = self._to_grid(state)
        weight = (self.project.weight * self.scale[:, None])[:, :, None, None]
        value = F.conv2d(self.norm(grid), weight)
        return self._from_grid(value, size)

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


def _resize(value: Tensor, grid: tuple[int, int]) -> Tensor:
    here = (value.shape[2], value.shape[3])
    if here == grid:
        return value
    if here[0] > grid[0] or here[1] > grid[1]:
        return F.adaptive_avg_pool2d(value, grid)
    return F.interpolate(value, size=grid, mode="bilinear", align_corners=False)


def _resize_tokens(tokens: Tensor, length: int) -> Tensor:
    return F.interpolate(tokens.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
