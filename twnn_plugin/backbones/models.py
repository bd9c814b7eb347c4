"""``twnn_<architecture>``: timm models with wormholes, created by ``timm.create_model``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..blocks.settings import option_names
from ..errors import AttachError, OptionError, nearest
from . import timm_adapter
from .attach import CHILD, OPTIONS, attach
from .closed_head import CLOSED_HEAD

__all__ = ["created", "default_cfgs", "register_wormhole_models"]

_PUBLIC = len(__all__)
PREFIX = "twnn_"

default_cfgs: dict[str, Any] = {}
"""Pretrained configurations of the registered names, where timm looks for them."""


def register_wormhole_models(architectures: Iterable[str] | None = None) -> list[str]:
    """Register ``twnn_<name>`` for architectures in timm's registry.

    Nothing is built, and the pretrained configurations are shared, so that all of timm takes some hundredths
    of a second; it is done when ``twnn_plugin`` is imported.

    Args:
        architectures: their names, such as those of models that you registered with timm; None: all of timm's
            own, but for those that have a ``twnn_`` name already.

    Returns:
        The new names.
    """
    names = list(timm_adapter.architectures() if architectures is None else architectures)
    made = []
    for name in names:
        derived = PREFIX + name
        if architectures is None and timm_adapter.is_registered(derived):
            continue
        config = timm_adapter.default_cfg(name)
        if config is not None:
            default_cfgs[derived] = config
        timm_adapter.register(_entry(name))
        del __all__[_PUBLIC:]  # timm adds the name, which is none of this module's
        made.append(derived)
    return made


def _entry(name: str) -> Callable[..., nn.Module]:
    create = timm_adapter.entry_point(name)

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, create, pretrained, kwargs)

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__module__ = __name__
    build.__doc__ = f"{name} with wormholes; options {', '.join(OPTIONS)} as in twnn_plugin.attach."
    return build


def _build(
    name: str, create: Callable[..., nn.Module], pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    options = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}
    for option in ("gate", "message"):
        if isinstance(options.get(option), list):  # as it comes from JSON
            options[option] = tuple(options[option])
    if kwargs.get("pretrained_model_args"):  # those of a saved model, its wormholes included
        saved = kwargs["pretrained_model_args"]
        kwargs["pretrained_model_args"] = {k: v for k, v in saved.items() if k not in OPTIONS}
    config, mine, heads = None, {}, {}
    if pretrained:
        overlay = kwargs.pop("pretrained_cfg_overlay", None)
        config = timm_adapter.resolved(PREFIX + name, kwargs.get("pretrained_cfg"), overlay)
        kwargs["pretrained_cfg"] = config
        if timm_adapter.from_elsewhere(config):
            state = timm_adapter.weights(config, kwargs.get("cache_dir"))
            mine = _taken(state, CHILD)
            heads = _taken(state, CLOSED_HEAD)
            if heads and "closed_head" not in options:
                raise AttachError(_UNASKED)
            kwargs["pretrained_cfg"] = timm_adapter.with_weights(config, state)
    # The backbone's weights are loaded by timm, adapted and strictly, before there are wormholes.
    backbone = created(PREFIX + name, create, pretrained, kwargs, OPTIONS)
    model = attach(backbone, **options)
    timm_adapter.rename(model, PREFIX + name, config)
    if mine:
        _load(model.get_submodule(CHILD), mine)
    head = dict(model.named_children()).get(CLOSED_HEAD)
    if heads and head is not None and _as_many_classes(head, heads):
        _load(head, heads)
    return model


def created(
    name: str,
    create: Callable[..., nn.Module],
    pretrained: bool,
    kwargs: dict[str, Any],
    options: Sequence[str],
) -> nn.Module:
    """The backbone of a model that has options of its own.

    Args:
        name: of the model.
        create: timm's entry point of the backbone.
        pretrained: whether timm loads published weights.
        kwargs: the backbone's options.
        options: all that the model takes besides.

    Raises:
        OptionError: an option that neither side has, with the nearest of all there are.
    """
    try:
        return create(pretrained=pretrained, **kwargs)
    except TypeError as error:
        unknown = re.search(r"(?:unexpected keyword argument|has no option) '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        own = [option for option in _own_options(create) if option not in options]
        known = [option for option in (*options, *own) if option != unknown[1]]
        backbones = f" The backbone's: {', '.join(own)}." if own else ""
        raise OptionError(
            f"{name} has no option {unknown[1]!r}.{nearest(unknown[1], known)} Its options beside the "
            f"backbone's: {', '.join(options)}.{backbones}"
        ) from error


def _own_options(create: Callable[..., nn.Module]) -> list[str]:
    """The options of the class that an entry point says it returns; none if it does not say."""
    try:
        made = inspect.signature(create, eval_str=True).return_annotation
    except Exception:  # an annotation may name anything, and be wrong
        return []
    return option_names(made) if isinstance(made, type) and issubclass(made, nn.Module) else []


_UNASKED = (
    "These weights have a closed head, which the model was not asked for: all samples would be answered by "
    "the open one. Pass closed_head=True (or the path that it was saved with), or closed_head=False to leave "
    "it out."
)


def _taken(state: dict[str, Any], child: str) -> dict[str, Any]:
    """Take a child's weights out of a state, by their names in the child."""
    names = [key for key in state if key.startswith(f"{child}.")]
    return {key.removeprefix(f"{child}."): state.pop(key) for key in names}


def _as_many_classes(head: nn.Module, saved: dict[str, Any]) -> bool:
    """Whether the saved classifiers are of this size: of another one, timm leaves a fresh one in place."""
    own = head.state_dict()
    return all(own[key].shape == value.shape for key, value in saved.items() if key in own)


def _load(holder: nn.Module, state: dict[str, Any]) -> None:
    """Load what the backbone knows nothing of."""
    try:
        holder.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise AttachError(
            f"The saved wormholes do not fit the ones that were asked for: {' '.join(lines)[:300]} Create "
            "the model with the wormholes that it was saved with, which save_for_hf keeps in model_args."
        ) from error
