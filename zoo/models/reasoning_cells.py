"""The map that the reasoning models iterate: a state, the input beside it at every step, a bounded state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Beside", "Patches", "RecallCell"]

_QUIET = -1.0  # a fresh latching cell writes little


class RecallCell(nn.Module):
    """``z' = tanh(out(u))`` or, latching, ``z' = max(z, sigmoid(out(u)))``, u from state and input.

    ``u = relu(enter([z; x]))``, then ``blocks`` times ``u = relu(u + conv2(relu(conv1(u))))``. The input
    enters at every step (recall, Bansal et al. 2022); tanh and sigmoid keep the state bounded, without
    which iterated ReLU networks explode on inputs larger than those of the training.

    A latching cell converges on every input, of any size, under any weights: no entry of its state ever
    falls and none exceeds 1. This is the inflationary fixed point of finite model theory (Gurevich & Shelah
    1986), and enough for what spreads, such as filling dead ends; what was written by mistake stays. It is
    to be solved by plain iteration from zero (other states have fixed points of their own), and
    differentiated through its steps: its Jacobian has eigenvalues of 1, which the implicit
    gradient does not take.

    Args:
        width: channels of the state.
        inputs: channels of the input.
        kernel: of the first convolution, odd; (1, 3) for strings.
        blocks: residual blocks, >= 0.
        inner: kernel of the residual blocks; None: the same.
        added: the input, of ``width`` channels, is added to what the first convolution makes of the state;
            otherwise that convolution sees both, the input of neighbours included.
        latching: the second form.
    """

    def __init__(
        self,
        width: int,
        inputs: int,
        kernel: tuple[int, int] = (3, 3),
        blocks: int = 2,
        inner: tuple[int, int] | None = None,
        added: bool = False,
        latching: bool = False,
    ):
        super().__init__()
        self.width, self.latching = width, latching
        inner = kernel if inner is None else inner
        self.added = added
        self.enter = _conv(width if added else width + inputs, width, kernel)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_conv(width, width, inner) for _ in range(2)) for _ in range(blocks)
        )
        self.out = nn.Conv2d(width, width, 1)
        if latching:
            nn.init.constant_(self.out.bias, _QUIET)  # type: ignore[arg-type]

    def forward(self, entry: Tensor) -> Tensor:
        """State and input (B, width + inputs, H, W) to the next state (B, width, H, W)."""
        z = entry[:, : self.width]
        u = F.relu(self.enter(z) + entry[:, self.width :] if self.added else self.enter(entry))
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            first, second = block
            u = F.relu(u + second(F.relu(first(u))))
        if self.latching:
            return torch.maximum(z, torch.sigmoid(self.out(u)))
        return torch.tanh(self.out(u))


def _conv(inputs: int, outputs: int, kernel: tuple[int, int]) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=(kernel[0] // 2, kernel[1] // 2))


class Beside(nn.Module):
    """The message of a wormhole whose body takes state and input side by side.

    The wormhole adds it to the body's entry, ``[0; x]``, which makes ``[z; x]``: the state returns as it is,
    neither projected nor normalised, so that no position hears of another one except through the body.
    It answers the same calls as :class:`~twnn_plugin.blocks.message.Message`.

    Args:
        channels: of the body's entry.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(channels), persistent=False)

    def weight(self) -> Tensor:
        """Nothing is projected."""
        return torch.empty(0)

    def forward(self, state: Tensor, size: torch.Size, weight: Tensor | None = None) -> Tensor:
        """State (B, width, H, W) to (B, ``size[1]``, H, W), zero beside it."""
        return F.pad(state, (0, 0, 0, 0, 0, size[1] - state.shape[1]))

    def scaled(self, value: Tensor, amount: Tensor) -> Tensor:
        """As it is: ``amount`` is 1, the gate is always open."""
        return value


class Patches(nn.Module):
    """Overlapping squares of pixels as tokens, and back; without parameters.

    Images whose sides do not fit are padded with zeros (walls) at the bottom and on the right.

    Args:
        channels: of the images.
        size: of a square, in pixels.
        stride: from one square to the next.
        margin: pixels around the image that belong to no square.
    """

    def __init__(self, channels: int, size: int = 6, stride: int = 4, margin: int = 1):
        super().__init__()
        self.size, self.stride, self.margin = size, stride, margin
        self.features = channels * size**2

    def cut(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) to tokens (B, features, h, w), half subtracted."""
        grid = [self._tokens(side) for side in images.shape[2:]]
        more = [self._pixels(tokens) - side for tokens, side in zip(grid, images.shape[2:], strict=True)]
        images = F.pad(images, (-self.margin, more[1] - self.margin, -self.margin, more[0] - self.margin))
        squares = F.unfold(images, self.size, stride=self.stride)
        return squares.unflatten(2, grid) - 0.5

    def join(self, tokens: Tensor) -> Tensor:
        """What tokens say of their squares, (B, c * size^2, h, w), added up: (B, c, H, W), as padded."""
        grid = tuple((side - 1) * self.stride + self.size for side in tokens.shape[2:])
        pixels = F.fold(tokens.flatten(2), grid, self.size, stride=self.stride)
        return F.pad(pixels, (self.margin,) * 4)

    def _tokens(self, side: int) -> int:
        return 1 + max(0, -(-(side - self._pixels(1)) // self.stride))

    def _pixels(self, tokens: int) -> int:
        return (tokens - 1) * self.stride + self.size + 2 * self.margin
