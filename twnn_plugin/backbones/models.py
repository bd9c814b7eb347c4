"""``twnn_<architecture>``: timm models with wormholes, created by ``timm.create_model``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import AttachError, nearest
from . import timm_adapter
from .attach import OPTIONS, attach

__all__ = ["default_cfgs", "register_wormhole_models"]

PREFIX = "twnn_"

default_cfgs: dict[str, Any] = {}
"""Pretrained configurations of the registered names, where timm looks for them."""


def register_wormhole_models(architectures: Iterable[str] | None = None) -> list[str]:
    """Register ``twnn_<name>`` for registered timm architectures; by default for all known families.

    Returns:
        The new names.
    """
    names = list(timm_adapter.architectures() if architectures is None else architectures)
    for name in names:
        derived = timm_adapter.derived_cfg(name, PREFIX + name)
        if derived is not None:
            default_cfgs[PREFIX + name] = derived
        timm_adapter.register(_entry(name))
    return [PREFIX + name for name in names]


def _entry(name: str) -> Callable[..., nn.Module]:
    create = timm_adapter.entry_point(name)

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}
        if kwargs.get("features_only"):
            raise AttachError(
                f"{PREFIX + name} cannot be made with features_only=True, which takes the model apart. Use "
                "model.forward_intermediates(images), which runs the whole model."
            )
        # The backbone's weights are loaded by timm, strictly, before there are wormholes.
        try:
            backbone = create(pretrained=pretrained, **kwargs)
        except TypeError as error:  # an option that neither side has
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            hint = nearest(unknown[1], OPTIONS)
            raise TypeError(f"{error}.{hint} Options of the wormholes: {', '.join(OPTIONS)}.") from error
        model = attach(backbone, **options)
        timm_adapter.rename(model, PREFIX + name)
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__module__ = __name__
    build.__doc__ = f"{name} with wormholes; options {', '.join(OPTIONS)} as in twnn_plugin.attach."
    return build
