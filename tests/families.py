"""One small member of each family of backbones, for tests of timm's manners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

import twnn_plugin as tw


@dataclass(frozen=True)
class Family:
    """A small model of a family.

    Attributes:
        name: timm's.
        options: what makes it small.
        span: a wormhole over more than one module.
        size: of the images.
        scale: of the message, so that an open wormhole settles.
        norms: whether it has batch normalisations.
    """

    name: str
    options: dict[str, Any]
    span: str
    size: int
    scale: float = 0.05
    norms: bool = False

    def plain(self, **options: Any) -> nn.Module:
        """The backbone; the same weights each time."""
        torch.manual_seed(0)
        return timm.create_model(self.name, **{"num_classes": 5, **self.options, **options})

    def twnn(self, wormholes: Any = None, **options: Any) -> nn.Module:
        """The backbone with wormholes; options of attach."""
        options = {"scale": self.scale, "max_iter": 60, **options}
        return tw.attach(self.plain(), wormholes=wormholes or self.span, **options)

    def images(self, batch: int = 3, size: Any = None, seed: int = 0) -> torch.Tensor:
        """Random images."""
        size = (self.size, self.size) if size is None else size
        return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


FAMILIES = {
    "resnet": Family(
        "resnet18", {"layers": (1, 1, 2, 1), "channels": (16, 16, 24, 32)}, "layer4->layer3", 64, norms=True
    ),
    "convnext": Family(
        "convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, "stages.3->stages.2", 64
    ),
    "vit": Family(
        "vit_tiny_patch16_224",
        {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2},
        "blocks.3->blocks.1",
        32,
    ),
    "swin": Family(
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        "layers.3->layers.2",
        64,
    ),
    "zoo": Family("resnet8_cifar", {}, "layer3->layer2", 32, norms=True),
}
