"""``dynalay_<architecture>``: models of timm whose stages an agent picks from, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dynalay import CHOICES, CONNECTION_OPTIONS, selected
from .dynalay_split import Split, split, stem, stem_multiply_adds

if TYPE_CHECKING:
    from twnn_plugin.policies import Policy
    from twnn_plugin.selection import LayerSelection

__all__ = ["DynaLayNet", "register_dynalay_models"]

_PUBLIC = len(__all__)
PREFIX = "dynalay_"
_OPEN_HEAD = "open_head."
_SOLVES = ("solver", "adjoint", "tol", "max_iter", "stop", "norm")
OPTIONS = ("fpi_layers", "policy", "max_choices", "open_head", *CONNECTION_OPTIONS, *_SOLVES)
"""Options of every ``dynalay_`` model besides its backbone's own."""

default_cfgs: dict[str, Any] = {}
"""Pretrained configurations of the registered names, where timm looks for them."""


class DynaLayNet(nn.Module):
    """A backbone in timm's manners, and an agent that picks which of its stages each sample iterates.

    Stage l becomes ``z = stage(h + message(z))``, solved to its fixed point for the samples that picked it
    (Mathur & Plis 2023). Where nothing is iterated it is the backbone, bit for bit, and the backbone's
    checkpoints load, strictly.

    Args:
        backbone: with ``forward_features``, ``forward_head`` and ``feature_info``, such as timm's models.
        fpi_layers: names of the stages that can be iterated; None: all; (): none, and ``selection`` is None.
        policy: registered name or instance: who iterates what; None: ``"dynalay"``.
        max_choices: decisions a sample may make.
        open_head: whether samples that iterated are answered by a head of their own.
        **options: of connections and solves, as for
            :class:`~zoo.models.dynalay.DynaLayCNN3`.

    Raises:
        AttachError: the backbone's stages are not called one after the other.
        UnknownNameError: an unknown stage, policy, solver or adjoint, with the nearest name.
        OptionError: an unknown option or an impossible value.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpi_layers: Sequence[str] | str | None = None,
        policy: str | Policy | None = None,
        max_choices: int = CHOICES,
        open_head: bool = False,
        **options: Any,
    ):
        from twnn_plugin.blocks.settings import check_names  # importing twnn_plugin imports this module

        check_names("DynaLayNet", options, OPTIONS)
        super().__init__()
        self.backbone = backbone
        parts = split(backbone)
        self.stages, self._first = parts.stages, (parts.layers[parts.stages[0]],)
        self.selection = self._select(parts, fpi_layers, policy, max_choices, open_head, options)
        self._whole: Any = (backbone,)
        self._stem_costs: dict[torch.Size, int] = {}
        self.register_load_state_dict_pre_hook(_adopt_plain)

    def _select(
        self,
        parts: Split,
        fpi_layers: Sequence[str] | str | None,
        policy: str | Policy | None,
        max_choices: int,
        open_head: bool,
        options: dict[str, Any],
    ) -> LayerSelection | None:
        return selected(
            parts.layers,
            parts.stages,
            parts.head,
            parts.example,
            parts.channels_last,
            fpi_layers,
            policy,
            max_choices,
            open_head,
            **options,
        )

    @property
    def _model(self) -> Any:
        return self._whole[0]

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return self._model.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the features."""
        return self._model.num_features

    @property
    def head_hidden_size(self) -> int:
        """Features that the classifier is given."""
        return self._model.head_hidden_size

    @property
    def feature_info(self) -> Any:
        """The backbone's."""
        return self._model.feature_info

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        if self.selection is None:
            return self._model(x)
        return self.selection(stem(self.backbone, self._first[0], x), self._stem_cost(x))

    def _stem_cost(self, x: Tensor) -> int:
        """Multiply-adds of what comes before the stages, for one image of this shape."""
        shape = x.shape[1:]
        if shape not in self._stem_costs:
            self._stem_costs[shape] = stem_multiply_adds(self.backbone, self._first[0], x)
        return self._stem_costs[shape]

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's features, with nothing iterated."""
        return self._model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, by the head of samples that are not iterated."""
        return self._model.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's, with nothing iterated."""
        return self._model.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self._model.get_classifier()

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """A new classifier for ``num_classes`` (0: none), for both paths."""
        self._model.reset_classifier(num_classes, *args, **kwargs)
        if self.selection is not None:
            weight = next(self.parameters())
            self.selection.set_head(split(self.backbone).head.to(weight.device, weight.dtype))

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers do not decay."""
        ask = getattr(self._model, "no_weight_decay", None)
        return {f"backbone.{name}" for name in (ask() if ask is not None else ())}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's groups of parameters by depth, for layer-wise learning rates."""
        return {name: _under(rule) for name, rule in self._model.group_matcher(coarse=coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused: the selection calls the stages itself, and would not checkpoint them.

        Raises:
            OptionError: ``enable`` is true.
        """
        from twnn_plugin.errors import OptionError

        if enable:
            raise OptionError(
                "DynaLay models keep the activations of their open-loop pass for the agent: there is no "
                "gradient checkpointing. The implicit adjoint already keeps one evaluation of each solve."
            )


def _under(rule: Any) -> Any:
    """A rule of timm's group matchers for names that begin with ``backbone.``."""
    if isinstance(rule, str):
        return rule.replace("^", r"^backbone\.", 1)
    if isinstance(rule, (list, tuple)):
        return type(rule)(_under(part) for part in rule)
    return rule


def _adopt_plain(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a plain backbone's checkpoint load strictly; what it knows nothing of stays as it is."""
    mine = (f"{prefix}backbone.", f"{prefix}selection.")
    if any(key.startswith(mine) for key in state):
        return
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}backbone.{key.removeprefix(prefix)}"] = state.pop(key)
    for name, value in module.state_dict().items():
        if name.startswith("selection."):
            state[prefix + name] = value


def register_dynalay_models(architectures: Iterable[str] | None = None) -> list[str]:
    """Register ``dynalay_<name>`` for architectures in timm's registry; nothing is built.

    Args:
        architectures: their names; None: all of timm's own.

    Returns:
        The new names. Those whose stages cannot be picked from are refused when they are created.
    """
    from twnn_plugin.backbones import timm_adapter

    names = list(timm_adapter.architectures() if architectures is None else architectures)
    made = []
    for name in names:
        derived = PREFIX + name
        if timm_adapter.is_registered(derived):
            continue
        config = timm_adapter.default_cfg(name)
        if config is not None:
            default_cfgs[derived] = config
        timm_adapter.register(_entry(name, timm_adapter.entry_point(name)))
        del __all__[_PUBLIC:]  # timm adds the name, which is none of this module's
        made.append(derived)
    return made


def _entry(name: str, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, create, pretrained, kwargs)

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__module__ = __name__
    build.__doc__ = f"{name} with an agent that picks stages to iterate; options {', '.join(OPTIONS)}."
    return build


def _build(
    name: str, create: Callable[..., nn.Module], pretrained: bool, kwargs: dict[str, Any]
) -> DynaLayNet:
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin.backbones import timm_adapter
    from twnn_plugin.backbones.models import created

    options = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}
    if kwargs.get("pretrained_model_args"):  # those of a saved model, its selection's included
        saved = kwargs["pretrained_model_args"]
        kwargs["pretrained_model_args"] = {k: v for k, v in saved.items() if k not in OPTIONS}
    config, mine = None, {}
    if pretrained:
        overlay = kwargs.pop("pretrained_cfg_overlay", None)
        config = timm_adapter.resolved(PREFIX + name, kwargs.get("pretrained_cfg"), overlay)
        kwargs["pretrained_cfg"] = config
        if timm_adapter.from_elsewhere(config):
            state, mine = _parts(timm_adapter.weights(config, kwargs.get("cache_dir")))
            kwargs["pretrained_cfg"] = timm_adapter.with_weights(config, state)
    backbone = created(PREFIX + name, create, pretrained, kwargs, OPTIONS)
    timm_adapter.rename(backbone, name, config)
    model = DynaLayNet(backbone, **options)
    known: Any = dict(backbone.pretrained_cfg)  # type: ignore[arg-type]
    known["architecture"] = PREFIX + name
    model.pretrained_cfg = model.default_cfg = known
    if config is not None and mine:
        if options.get("open_head") is False:  # it is not wanted any more
            mine = {key: value for key, value in mine.items() if not key.startswith(_OPEN_HEAD)}
        _load(model.selection, mine, config.num_classes != model.num_classes)
    return model


def _parts(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of the backbone and those of the selection; a plain backbone's file has no such parts."""
    ours = ("backbone.", "selection.")
    if not all(key.startswith(ours) for key in state):
        return state, {}
    backbone, selection = (
        {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
        for part in ours
    )
    return backbone, selection


def _load(selection: LayerSelection | None, saved: dict[str, Any], resized: bool) -> None:
    """Load what the backbone knows nothing of.

    Args:
        selection: of the new model, whose backbone is loaded.
        saved: the selection's weights.
        resized: whether the model has another number of classes than the saved one: what depends on it in the
            open head stays new, as timm's classifiers do.
    """
    from twnn_plugin.errors import AttachError

    reason = "no layer can be iterated (fpi_layers is empty)."
    if selection is not None:
        own = selection.state_dict()
        fresh = {key: value for key, value in own.items() if key.startswith(_OPEN_HEAD)}
        if resized:
            saved = {
                key: value
                for key, value in saved.items()
                if not key.startswith(_OPEN_HEAD) or (key in fresh and fresh[key].shape == value.shape)
            }
        elif any(key.startswith(_OPEN_HEAD) for key in saved):
            fresh = {}  # all of it must be there
        try:
            selection.load_state_dict({**fresh, **saved})
            return
        except RuntimeError as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
    raise AttachError(
        f"The saved selection does not fit the one that was asked for: {reason} Create the model with the "
        "options that it was saved with (fpi_layers, policy, open_head, message, ...), which save_for_hf "
        "keeps in model_args; tw.configure gives it another policy afterwards."
    )
