"""Small residual networks with group normalisation for small images, where a run takes a minute.

Group normalisation rather than batch normalisation: a sample's logits do not depend on its batch mates in
training either, and a span that is iterated needs no statistics held fixed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from .staged import StagedNet, build, cifar_cfg

__all__ = ["GroupNorm8", "ResNetTiny", "resnet6_tiny", "resnet8_tiny"]


class GroupNorm8(nn.GroupNorm):
    """Group normalisation in groups of eight channels; one group where eight does not divide them."""

    def __init__(self, channels: int, **kwargs: Any):
        super().__init__(channels // 8 if channels % 8 == 0 else 1, channels, **kwargs)


class ResNetTiny(StagedNet):
    """A 3x3 stem and stages of basic blocks; every stage but the first halves the image.

    Args:
        widths: channels of the stages, one or more.
        depth: blocks in each stage, at least 1.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type; ``"max"`` suits items that fill a small part of the image.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (8, 16, 32),
        depth: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        if not widths or min(widths) < 1 or depth < 1:
            raise ValueError(
                f"widths are one or more positive numbers, depth is at least 1; got {widths!r}, {depth!r}."
            )
        stages = tuple(f"layer{index}" for index in range(1, len(widths) + 1))
        super().__init__(("stem", *stages), num_classes, in_chans, drop_rate)
        stem = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=stem, norm=GroupNorm8(widths[0]), act=nn.ReLU()))
        before = widths[0]
        for index, (name, width) in enumerate(zip(stages, widths, strict=True)):
            self.add_module(name, _stage(before, width, depth, 2 if index else 1))
            self.feature_info.append({"num_chs": width, "reduction": 2**index, "module": name})
            before = width
        self._add_head(before, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                module.zero_init_last()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _stage(before: int, width: int, depth: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != width:
        shortcut = downsample_conv(before, width, kernel_size=1, stride=stride, norm_layer=GroupNorm8)
    first = BasicBlock(before, width, stride, shortcut, norm_layer=GroupNorm8)
    rest = (BasicBlock(width, width, norm_layer=GroupNorm8) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


default_cfgs = generate_default_cfgs(
    {
        "resnet6_tiny.untrained": cifar_cfg(first_conv="stem.conv", pool_size=(16, 16)),
        "resnet8_tiny.untrained": cifar_cfg(first_conv="stem.conv"),
    }
)


def _create(variant: str, pretrained: bool, stages: int, /, **kwargs: Any) -> ResNetTiny:
    return build(ResNetTiny, variant, pretrained, feature_cfg={"out_indices": tuple(range(stages))}, **kwargs)


@register_model
def resnet6_tiny(pretrained: bool = False, **kwargs: Any) -> ResNetTiny:
    """Two stages of one block and max pooling, 5 thousand parameters; a unit sees 13 pixels."""
    widths = tuple(kwargs.pop("widths", (8, 16)))
    kwargs = {"global_pool": "max", **kwargs}
    return _create("resnet6_tiny", pretrained, len(widths), widths=widths, **kwargs)


@register_model
def resnet8_tiny(pretrained: bool = False, **kwargs: Any) -> ResNetTiny:
    """Three stages of one block, 20 thousand parameters."""
    widths = tuple(kwargs.pop("widths", (8, 16, 32)))
    return _create("resnet8_tiny", pretrained, len(widths), widths=widths, **kwargs)
