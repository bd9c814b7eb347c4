"""ResNets for 32x32 images (He et al. 2016, section 4.2), from timm's basic block.

timm's own ResNet has a 7x7 stem of 64 channels and four stages, which its constructor fixes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from .staged import StagedNet, build, cifar_cfg

__all__ = ["ResNetCifar", "resnet8_cifar", "resnet20_cifar", "resnet38_cifar"]


class ResNetCifar(StagedNet):
    """A 3x3 stem and three stages of ``depth`` basic blocks each: ``6 * depth + 2`` layers.

    Where a stage begins with another shape, the shortcut is a 1x1 convolution (the paper's option B).

    Args:
        depth: blocks in each stage, >= 1.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        widths: channels of the three stages.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.
    """

    def __init__(
        self,
        depth: int = 3,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(("stem", "layer1", "layer2", "layer3"), num_classes, in_chans, drop_rate)
        if depth < 1:
            raise ValueError(f"depth must be at least 1 block a stage; got {depth!r}.")
        stem = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.stem = nn.Sequential(
            OrderedDict(conv=stem, bn=nn.BatchNorm2d(widths[0]), act=nn.ReLU(inplace=True))
        )
        before, reduction = widths[0], 1
        for name, width, stride in zip(self.stages[1:], widths, (1, 2, 2), strict=True):
            reduction *= stride
            self.add_module(name, _stage(before, width, depth, stride))
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})
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
        shortcut = downsample_conv(before, width, kernel_size=1, stride=stride)
    first = BasicBlock(before, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(depth - 1)))


default_cfgs = generate_default_cfgs(
    {f"resnet{layers}_cifar.untrained": cifar_cfg(first_conv="stem.conv") for layers in (8, 20, 38)}
)


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> ResNetCifar:
    return build(ResNetCifar, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """One block a stage, 78 thousand parameters."""
    return _create("resnet8_cifar", pretrained, **{"depth": 1, **kwargs})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """Three blocks a stage, 0.27 million parameters."""
    return _create("resnet20_cifar", pretrained, **{"depth": 3, **kwargs})


@register_model
def resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """Six blocks a stage, 0.56 million parameters."""
    return _create("resnet38_cifar", pretrained, **{"depth": 6, **kwargs})
