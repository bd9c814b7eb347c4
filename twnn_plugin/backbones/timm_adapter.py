"""What timm says of its models; the only file of this package that knows timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import timm
import torch
from timm.models import DefaultCfg, FeatureInfo, PretrainedCfg
from torch import Tensor, nn

from .base import Backbone, Stage

__all__ = [
    "TimmBackbone",
    "architectures",
    "default_cfg",
    "entry_point",
    "from_elsewhere",
    "groups",
    "is_registered",
    "register",
    "rename",
    "resolved",
    "weights",
    "with_weights",
]

_SMALL = 64  # pixels; enough for five halvings, when the model takes any size


class TimmBackbone(Backbone):
    """Stages, sizes and layouts of timm models, from their ``feature_info`` and ``pretrained_cfg``."""

    def claims(self, model: nn.Module) -> bool:
        return hasattr(model, "pretrained_cfg")

    def stages(self, model: nn.Module) -> list[Stage]:
        paths = {name for name, _ in model.named_modules()}
        prefix, infos = _feature_info(model)
        declared = [Stage(self.path(model, prefix + i["module"]), i.get("reduction")) for i in infos]
        found = [stage for stage in declared if stage.name in paths]
        return found if len(found) > 1 else (_numbered(model, declared) or found)

    def example(self, model: nn.Module, batch: int) -> Tensor:
        return self._example(model, batch, _SMALL, 1)

    def examples(self, model: nn.Module, batches: Sequence[int]) -> Iterator[Sequence[Tensor]]:
        sizes = [_SMALL, 4 * _SMALL, None]  # some need more pixels than they say; None: what they say
        folds = [1, 16, 4]  # a first convolution may see blocks of 4x4 or 2x2 pixels as channels
        tried: list[torch.Size] = []
        for fold, size in product(folds, sizes):
            inputs = [self._example(model, batch, size, fold) for batch in batches]
            if inputs[0].shape not in tried:
                tried.append(inputs[0].shape)
                yield inputs

    def _example(self, model: nn.Module, batch: int, small: int | None, fold: int) -> Tensor:
        declared: Any = model.pretrained_cfg
        config: dict[str, Any] = declared or {}
        channels, height, width = config.get("input_size", (3, 224, 224))
        first = config.get("first_conv")
        first = next(iter(first), None) if isinstance(first, (tuple, list)) else first
        modules = dict(model.named_modules())
        if first:
            channels = getattr(modules.get(self.path(model, first)), "in_channels", channels)
            channels = max(1, channels // fold)
        # The first convolution is part of what cuts an image into patches, and knows its size.
        holder = first.rpartition(".")[0] if first else ""
        holders = [modules.get(self.path(model, path)) for path in ("patch_embed", holder) if path]
        size = next((known for part in holders if (known := getattr(part, "img_size", None))), None)
        if size:
            height, width = size
        elif small is not None and not config.get("fixed_input_size", False):
            height, width = min(height, small), min(width, small)
        else:
            height, width = _image_size(model, (height, width))
        weight = next(model.parameters())
        generator = torch.Generator("cpu").manual_seed(0)
        value = torch.randn(batch, channels, height, width, generator=generator, device="cpu")
        return value.to(weight.device, weight.dtype)

    def channels_last(self, model: nn.Module) -> bool:
        # timm's wrapper says how its features lie, not how the model that it holds works.
        held = dict(model.named_children()).get("model") if self.gathers(model) else None
        return str(getattr(held or model, "output_fmt", "NCHW")).upper().endswith("NHWC")

    def gathers(self, model: nn.Module) -> bool:
        return isinstance(getattr(model, "feature_info", None), FeatureInfo)

    def path(self, model: nn.Module, name: str) -> str:
        # timm's wrappers for features_only hold the model as a child, or flatten its first containers.
        if not self.gathers(model):
            return name
        known = {path for path, _ in model.named_modules()}
        tries = (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}")
        return next((path for path in tries if path in known), name)


def _image_size(model: nn.Module, declared: tuple[int, int]) -> tuple[int, int]:
    """The pixels (H, W) of the ``img_size`` that a model was made with; else those declared for its weights.

    Models that cut no patches keep no such size. Newer versions of timm remember it for them; with an older
    one such a model needs an example.
    """
    ask: Any = getattr(timm.models, "get_model_input_config", None)
    if ask is None or not getattr(model, "pretrained_cfg", None):
        return declared
    height, width = ask(model)["input_size"][-2:]
    return height, width


def _feature_info(model: nn.Module) -> tuple[str, list[dict[str, Any]]]:
    """What a model (or, in a few, a child of it) says of its stages, and the path of who says it."""
    for name, module in [("", model), *((f"{n}.", child) for n, child in model.named_children())]:
        known: Any = getattr(module, "feature_info", None)
        if known is not None:
            return name, list(getattr(known, "info", known))
    return "", []


def _numbered(model: nn.Module, declared: Sequence[Stage]) -> list[Stage]:
    """The children of the container with the most weights, for models whose stages are not modules.

    Of two containers with as many children as there are stages declared, the one that is heavier; their
    reductions are those declared.
    """
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    fitting = [pair for pair in lists if len(pair[1]) == len(declared)] or lists
    if not fitting:
        return []
    path, chosen = max(fitting, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    known = [stage.reduction for stage in declared] if len(chosen) == len(declared) else [None] * len(chosen)
    return [Stage(f"{path}.{i}", reduction) for i, reduction in enumerate(known)]


def architectures() -> list[str]:
    """timm's own architectures."""
    return [name for name in timm.list_models() if entry_point(name).__module__.startswith("timm.")]


def groups(model: nn.Module, matcher: Any) -> dict[str, int]:
    """The group for layer decay of each parameter and of each module with parameters, by name."""
    known: Any = [
        find(model, matcher, reverse=True)
        for find in (timm.models.group_modules, timm.models.group_parameters)
    ]
    return {name: int(group) for found in known for name, group in found.items()}


def is_registered(name: str) -> bool:
    """Whether timm knows an architecture of this name."""
    return timm.is_model(name)


def entry_point(name: str) -> Callable[..., nn.Module]:
    """timm's entry point of an architecture."""
    return timm.models.model_entrypoint(name)


def register(entry: Callable[..., nn.Module]) -> None:
    """Register an entry point under its ``__name__``."""
    timm.models.register_model(entry)


def default_cfg(name: str) -> DefaultCfg | None:
    """The pretrained configurations of an architecture, for another name of it: the same tags and weights."""
    module = sys.modules[entry_point(name).__module__]
    known = getattr(module, "default_cfgs", {}).get(name)  # where timm itself takes them from
    if not isinstance(known, DefaultCfg):
        return None
    configs = dict(known.cfgs)
    for tag, config in configs.items():
        if config.hf_hub_id == "timm/":  # timm completes it by the name that is registered
            configs[tag] = replace(config, hf_hub_id=f"timm/{name}.{tag}" if tag else f"timm/{name}")
    return DefaultCfg(known.tags, configs, known.is_pretrained)


def resolved(name: str, config: Any, overlay: Any) -> PretrainedCfg:
    """The configuration that timm would create ``name`` with."""
    return timm.models.resolve_pretrained_cfg(name, config, overlay)


def from_elsewhere(config: PretrainedCfg) -> bool:
    """Whether the weights come from a folder, a file, a hub's repository named by the user, or from memory.

    These may be those of a model with wormholes; timm's own never are.
    """
    named = config.source in ("hf-hub", "local-dir") or bool(config.file) or bool(config.state_dict)
    return named and not config.custom_load


class _Receiver(nn.Module):
    """Takes the weights that timm loads for a model."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.state = dict(state_dict)
        return super().load_state_dict({}, strict=False)


def weights(config: PretrainedCfg, cache_dir: Any) -> dict[str, Any]:
    """The weights that a configuration points at, as they are stored."""
    receiver = _Receiver()
    as_stored = replace(config, first_conv=None, classifier=None).to_dict()
    timm.models.load_pretrained(receiver, as_stored, cache_dir=cache_dir)
    return receiver.state


def with_weights(config: PretrainedCfg, state: dict[str, Any]) -> PretrainedCfg:
    """The configuration with these weights in place of those it points at."""
    return replace(config, source=None, file=None, state_dict=state)


def rename(model: nn.Module, derived: str, config: PretrainedCfg | None = None) -> None:
    """Let the model's configuration name the architecture it was created as, and where it came from."""
    declared: Any = model.pretrained_cfg
    known: dict[str, Any] = dict(declared)
    known["architecture"] = derived
    if config is not None:  # not the weights, but where they are
        known.update(source=config.source, file=config.file)
        known.pop("state_dict", None)
    model.pretrained_cfg = model.default_cfg = known  # type: ignore[assignment]
