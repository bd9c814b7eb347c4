"""``ff_prefix``, ``ff_maze``, ``ff_pathfinder``: feed-forward nets with as many parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .reasoning import Stem, check_input, task_cfg
from .reasoning_cells import Patches
from .staged import StagedNet, build, without_features

__all__ = ["FeedForwardMaze", "FeedForwardPathfinder", "FeedForwardPrefix", "Residual"]


class Residual(nn.Module):
    """``relu(u + conv2(relu(conv1(u))))``: a block of the reasoning models' cell, with weights of its own.

    Args:
        width: channels.
        kernel: odd.
    """

    def __init__(self, width: int, kernel: tuple[int, int] = (3, 3)):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.first = nn.Conv2d(width, width, kernel, padding=padding)
        self.second = nn.Conv2d(width, width, kernel, padding=padding)

    def forward(self, u: Tensor) -> Tensor:
        """(B, width, H, W) to the same."""
        return F.relu(u + self.second(F.relu(self.first(u))))


class FeedForwardPrefix(nn.Module):
    """Bits (B, 1, n) to logits (B, 2, n) by a chain of residual blocks.

    Args:
        num_classes: outputs at every position.
        in_chans: channels of the input.
        width: channels.
        depth: blocks; each sees two positions farther on either side.
    """

    def __init__(self, num_classes: int = 2, in_chans: int = 1, width: int = 12, depth: int = 18):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.enter = nn.Conv2d(in_chans, width, (1, 3), padding=(0, 1))
        self.blocks = nn.Sequential(*(Residual(width, (1, 3)) for _ in range(depth)))
        self.head = nn.Conv2d(width, num_classes, 1)

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head

    def forward(self, inputs: Tensor) -> Tensor:
        """Bits to logits."""
        channels = self.enter.in_channels
        check_input(inputs, 3, channels, f"bits of shape (B, {channels}, n)", self.enter.weight)
        u = F.relu(self.enter((2 * inputs - 1).unsqueeze(2)))
        return self.head(self.blocks(u)).squeeze(2)


class FeedForwardMaze(nn.Module):
    """Images (B, 3, H, W) to logits (B, 2, H, W) by residual blocks on the tokens of ``twnn_maze``.

    Args:
        num_classes: outputs at every pixel.
        in_chans: channels of the image.
        width: channels.
        depth: blocks; each sees two cells of the maze farther.
    """

    def __init__(self, num_classes: int = 2, in_chans: int = 3, width: int = 14, depth: int = 5):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.patches = Patches(in_chans)
        self.embed = nn.Conv2d(self.patches.features, width, 1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Conv2d(2 * width, num_classes * self.patches.size**2, 1)

    def get_classifier(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.head

    def forward(self, inputs: Tensor) -> Tensor:
        """Images to logits."""
        channels = self.embed.in_channels // self.patches.size**2
        check_input(inputs, 4, channels, f"images of shape (B, {channels}, H, W)", self.embed.weight)
        x = self.embed(self.patches.cut(inputs))
        logits = self.patches.join(self.head(torch.cat([self.blocks(F.relu(x)), x], dim=1)))
        return logits[:, :, : inputs.shape[2], : inputs.shape[3]]


class FeedForwardPathfinder(StagedNet):
    """The stem of ``twnn_pathfinder``, a chain of residual blocks, a pooled classifier.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        width: channels.
        depth: residual blocks.
        downsample: halvings of the image before the blocks.
        questions: answered at each position before the pooling, as in ``twnn_pathfinder``; 0: none.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.
    """

    def __init__(
        self,
        num_classes: int = 2,
        in_chans: int = 1,
        width: int = 12,
        depth: int = 4,
        downsample: int = 1,
        questions: int = 0,
        drop_rate: float = 0.0,
        global_pool: str = "max",
    ):
        super().__init__(("stem", "layer1"), num_classes, in_chans, drop_rate)
        self.stem = Stem(in_chans, width, downsample)
        self.layer1 = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.feature_info = [
            {"num_chs": width, "reduction": 2**downsample, "module": name} for name in self.stages
        ]
        self._add_head(width, global_pool, questions)


default_cfgs = generate_default_cfgs(
    {
        "ff_prefix.untrained": task_cfg((1, 1, 32), first_conv="enter"),
        "ff_maze.untrained": task_cfg((3, 24, 24), first_conv="embed"),
        "ff_pathfinder.untrained": task_cfg((1, 32, 32), first_conv="stem.conv", classifier="fc"),
    }
)


@register_model
def ff_prefix(pretrained: bool = False, **kwargs: Any) -> FeedForwardPrefix:
    """As many parameters as ``twnn_prefix``, in 18 residual blocks."""
    return without_features(FeedForwardPrefix, "ff_prefix", pretrained, **kwargs)


@register_model
def ff_maze(pretrained: bool = False, **kwargs: Any) -> FeedForwardMaze:
    """As many parameters as ``twnn_maze``, in 5 residual blocks."""
    return without_features(FeedForwardMaze, "ff_maze", pretrained, **kwargs)


@register_model
def ff_pathfinder(pretrained: bool = False, **kwargs: Any) -> FeedForwardPathfinder:
    """As many parameters as ``twnn_pathfinder``, in residual blocks."""
    return build(
        FeedForwardPathfinder, "ff_pathfinder", pretrained, feature_cfg={"out_indices": (0, 1)}, **kwargs
    )
