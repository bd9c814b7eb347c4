"""The way back through a temporal wormhole: which time step is read, and what it adds to which input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .spec import END

__all__ = ["TokenMessage", "read", "valid_steps"]


def valid_steps(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, L) bool: which steps of (B, L, ...) are within the rows' lengths."""
    steps = torch.arange(x.shape[1], device=x.device)
    if lengths is None:
        return steps.new_ones(x.shape[0], x.shape[1], dtype=torch.bool)
    return steps < lengths[:, None]


def read(state: Tensor, tail: Tensor, lengths: Tensor | None, delay: int, directions: int) -> Tensor:
    """What a wormhole reads of a layer's outputs, for each time step that it sends to.

    Args:
        state: (B, L, H) the source's outputs.
        tail: (B, d, H) the outputs of the d steps before the first, for a delay d >= 1.
        lengths: (B,) valid steps, or None.
        delay: as in :class:`~twnn_plugin.sequence.spec.TemporalSpec`.
        directions: 2 if H is the outputs of both directions of a bidirectional layer.

    Returns:
        (B, L, H); for the end of the sequence (B, 1, H), the same for all steps.
    """
    if delay == 0:
        return state
    if delay != END:
        return torch.cat([tail, state], dim=1)[:, : state.shape[1]]
    if lengths is None:
        last = state[:, -1:]
    else:
        index = (lengths - 1).clamp_min(0)[:, None, None].expand(-1, 1, state.shape[2])
        last = state.gather(1, index)
    if directions == 1:
        return last
    half = state.shape[2] // 2  # the other direction ends at the first step
    return torch.cat([last[..., :half], state[:, :1, half:]], dim=-1)


class TokenMessage(nn.Module):
    """Normalise each time step by itself, project, scale: (B, T, H) -> (B, T, C).

    As :class:`~twnn_plugin.blocks.message.Message`, but a step's message depends on that step alone:
    neither on the future nor on padding.

    Args:
        source: features of the state.
        target: features of the input it is added to.
        scale: initial value of the scale of each feature; small, so that a freshly opened wormhole stays
            near the plain stack.
    """

    def __init__(self, source: int, target: int, scale: float = 0.1):
        super().__init__()
        if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale == 0:
            raise OptionError(
                f"A message's scale must be finite and not zero, or nothing is learnt; got {scale!r}."
            )
        self.norm = nn.LayerNorm(source)
        self.project = nn.Linear(source, target, bias=False)
        self.scale = nn.Parameter(torch.full((target,), float(scale)))

    def forward(self, state: Tensor) -> Tensor:
        """The message of each step."""
        return self.project(self.norm(state)) * self.scale

    def multiply_adds(self, steps: int) -> int:
        """Multiply-adds for one sequence of so many steps."""
        return steps * self.project.in_features * self.project.out_features
