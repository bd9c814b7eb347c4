"""Recurrent image classifiers in timm's registry: images read row by row or pixel by pixel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .staged import check_further, without_features

__all__ = [
    "ImageSequenceNet",
    "gru_pixels",
    "gru_rows",
    "lstm_pixels",
    "lstm_rows",
    "twnn_gru_pixels",
    "twnn_gru_rows",
    "twnn_lstm_pixels",
    "twnn_lstm_rows",
]


class ImageSequenceNet(nn.Module):
    """An image as a sequence of its rows or pixels, a recurrent stack, and a classifier of its last output.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        img_size: height and width of the images; rows must be that wide.
        by: ``"rows"`` or ``"pixels"``.
        cell: ``"gru"`` or ``"lstm"``.
        hidden: width of the embedding and of each layer.
        layers: how many.
        drop_rate: dropout before the classifier.
        **stack: further options of :class:`twnn_plugin.sequence.RecurrentStack`, ``wormholes`` above all.

    Raises:
        OptionError: an unknown option or an impossible value.
        ValueError: images of another size.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 28,
        by: str = "rows",
        cell: str = "gru",
        hidden: int = 96,
        layers: int = 2,
        drop_rate: float = 0.0,
        **stack: Any,
    ):
        super().__init__()
        # Here rather than above: importing twnn_plugin imports this module.
        from twnn_plugin.sequence import RecurrentStack
        from twnn_plugin.sequence.stack import further_options

        check_further(ImageSequenceNet, stack, further_options())
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, img_size
        self.by, self.drop_rate = by, drop_rate
        self.embed = nn.Linear(in_chans * (img_size if by == "rows" else 1), hidden)
        self.stack = RecurrentStack(cell, hidden, hidden, layers, **stack)
        self.num_features = self.head_hidden_size = self.stack.output_size
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0: none); there is no pooling to choose."""
        weight = self.embed.weight
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc = head.to(weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to outputs of all steps (B, L, num_features)."""
        # Here rather than above: importing twnn_plugin imports this module, and the data need it.
        from ..data.sequences import as_sequences

        if self.by == "rows" and x.shape[-1] != self.img_size:
            raise ValueError(
                f"This model reads rows of {self.img_size} pixels; the images are {tuple(x.shape[-2:])}. "
                f"Build it with img_size={x.shape[-1]}"
            )
        out, _ = self.stack(self.embed(as_sequences(x, self.by)), keep_state=False)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Outputs of all steps to logits (B, num_classes), or to what the classifier is given."""
        x = F.dropout(x[:, -1], p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def auxiliary_loss(self) -> Tensor:
        """What the wormholes add to the loss of the last training pass, a scalar; zero if nothing."""
        return self.stack.auxiliary_loss()


_NAMES = [
    f"{prefix}{cell}_{by}"
    for prefix in ("", "twnn_")
    for cell in ("gru", "lstm")
    for by in ("rows", "pixels")
]

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 28, 28),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "first_conv": "embed",
            "classifier": "fc",
            "license": "apache-2.0",
        }
        for name in _NAMES
    }
)


def _create(variant: str, pretrained: bool, /, **kwargs: Any) -> ImageSequenceNet:
    _, cell, by = ("_" + variant.removeprefix("twnn_")).split("_")
    options = {"cell": cell, "by": by, **kwargs}
    if variant.startswith("twnn_"):
        options = {"wormholes": "auto", **options}
    return without_features(ImageSequenceNet, variant, pretrained, **options)


@register_model
def gru_rows(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """Two GRU layers over the rows of an image."""
    return _create("gru_rows", pretrained, **kwargs)


@register_model
def lstm_rows(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """Two LSTM layers over the rows of an image."""
    return _create("lstm_rows", pretrained, **kwargs)


@register_model
def gru_pixels(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """Two GRU layers over the pixels of an image."""
    return _create("gru_pixels", pretrained, **kwargs)


@register_model
def lstm_pixels(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """Two LSTM layers over the pixels of an image."""
    return _create("lstm_pixels", pretrained, **kwargs)


@register_model
def twnn_gru_rows(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """``gru_rows`` with a wormhole, last layer to first unless ``wormholes`` says otherwise."""
    return _create("twnn_gru_rows", pretrained, **kwargs)


@register_model
def twnn_lstm_rows(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """``lstm_rows`` with a wormhole, last layer to first unless ``wormholes`` says otherwise."""
    return _create("twnn_lstm_rows", pretrained, **kwargs)


@register_model
def twnn_gru_pixels(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """``gru_pixels`` with a wormhole, last layer to first unless ``wormholes`` says otherwise."""
    return _create("twnn_gru_pixels", pretrained, **kwargs)


@register_model
def twnn_lstm_pixels(pretrained: bool = False, **kwargs: Any) -> ImageSequenceNet:
    """``lstm_pixels`` with a wormhole, last layer to first unless ``wormholes`` says otherwise."""
    return _create("twnn_lstm_pixels", pretrained, **kwargs)
