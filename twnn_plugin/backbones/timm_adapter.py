"""What timm says of its models; the only file of this package that knows timm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models import DefaultCfg
from torch import Tensor, nn

from .base import Backbone, Stage

__all__ = ["TimmBackbone", "architectures", "derived_cfg", "entry_point", "register", "rename"]

_SMALL = 64  # pixels; enough for five halvings, when the model takes any size

_FAMILIES = ("resnet", "convnext", "vision_transformer", "deit")
"""Modules of models whose names are registered with the ``twnn_`` prefix."""


class TimmBackbone(Backbone):
    """Stages, sizes and layouts of timm models, from their ``feature_info`` and ``pretrained_cfg``."""

    def claims(self, model: nn.Module) -> bool:
        return hasattr(model, "feature_info") and hasattr(model, "pretrained_cfg")

    def stages(self, model: nn.Module) -> list[Stage]:
        known: Any = model.feature_info
        infos = getattr(known, "info", known)
        return [Stage(info["module"], info.get("reduction")) for info in infos]

    def example(self, model: nn.Module, batch: int) -> Tensor:
        declared: Any = model.pretrained_cfg
        config: dict[str, Any] = declared or {}
        channels, height, width = config.get("input_size", (3, 224, 224))
        first = config.get("first_conv")
        first = first[0] if isinstance(first, (tuple, list)) else first
        if first:
            conv = model.get_submodule(first)
            channels = getattr(conv, "in_channels", channels)
        patches = getattr(model, "patch_embed", None)
        size = getattr(patches, "img_size", None)
        if size:
            height, width = size
        elif not config.get("fixed_input_size", False):
            height, width = min(height, _SMALL), min(width, _SMALL)
        weight = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(batch, channels, height, width, generator=generator)
        return value.to(weight.device, weight.dtype)

    def channels_last(self, model: nn.Module) -> bool:
        return str(getattr(model, "output_fmt", "NCHW")).upper().endswith("NHWC")


def architectures() -> list[str]:
    """The architectures that get a ``twnn_`` name."""
    return sorted(name for family in _FAMILIES for name in timm.list_models(module=family))


def entry_point(name: str) -> Callable[..., nn.Module]:
    """timm's entry point of an architecture."""
    return timm.models.model_entrypoint(name)


def register(entry: Callable[..., nn.Module]) -> None:
    """Register an entry point under its ``__name__``."""
    timm.models.register_model(entry)


def derived_cfg(name: str, derived: str) -> DefaultCfg | None:
    """The pretrained configurations of an architecture under another name: same tags, same weights."""
    configs = timm.models.get_arch_pretrained_cfgs(name)
    if not configs:
        return None
    tags = {key.split(".", 1)[1] if "." in key else "": config for key, config in configs.items()}
    renamed = {tag: replace(config, architecture=derived) for tag, config in tags.items()}
    pretrained = any(config.has_weights for config in renamed.values())
    return DefaultCfg(tags=deque(renamed), cfgs=renamed, is_pretrained=pretrained)


def rename(model: nn.Module, derived: str) -> None:
    """Let the model's configuration name the architecture it was created as."""
    config = dict(model.pretrained_cfg, architecture=derived)  # type: ignore[call-overload]
    model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
