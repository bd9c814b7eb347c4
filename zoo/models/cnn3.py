"""``cnn3``: the three-layer CNN of the DynaLay paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import ConfigError
from .staged import StagedNet, build, cifar_cfg

__all__ = ["ConvNet3", "ConvNormAct", "cnn3"]


class ConvNormAct(nn.Module):
    """3x3 convolution, batch norm, ReLU and 2x2 max pooling.

    Args:
        in_chans: channels in.
        out_chans: channels out.
    """

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, out_chans, H/2, W/2)."""
        return self.pool(self.act(self.bn(self.conv(x))))


class ConvNet3(StagedNet):
    """Layer1, Layer2, Layer3 and a linear classifier: "Model 0" of Mathur & Plis (2023), appendix D.

    The paper names the three layers that its agent chooses among, and gives no widths; these are
    the customary ones. Images must be at least 8x8.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        widths: channels of the three layers.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.

    Raises:
        ConfigError: ``widths`` are not three whole numbers, each at least 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (32, 64, 128),
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(("layer1", "layer2", "layer3"), num_classes, in_chans, drop_rate)
        before, channels = in_chans, _checked(widths, len(self.stages))
        for index, (name, width) in enumerate(zip(self.stages, channels, strict=True), start=1):
            self.add_module(name, ConvNormAct(before, width))
            self.feature_info.append({"num_chs": width, "reduction": 2**index, "module": name})
            before = width
        self._add_head(before, global_pool)


def _checked(widths: Any, count: int) -> tuple[int, ...]:
    listed = isinstance(widths, Sequence) and len(widths) == count
    if not listed or not all(type(width) is int and width >= 1 for width in widths):
        raise ConfigError(
            f"widths are the channels of the {count} layers, whole numbers of at least 1 such as "
            f"(32, 64, 128); got {widths!r}."
        )
    return tuple(widths)


default_cfgs = generate_default_cfgs(
    {"cnn3.untrained": cifar_cfg(first_conv="layer1.conv", pool_size=(4, 4))}
)


@register_model
def cnn3(pretrained: bool = False, **kwargs: Any) -> ConvNet3:
    """Three convolutional layers, 95 thousand parameters (DynaLay's main network)."""
    return build(ConvNet3, "cnn3", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)
