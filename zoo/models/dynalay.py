"""``dynalay_cnn3``: the DynaLay paper's network, a CNN of three layers that an agent picks from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .cnn3 import ConvNet3
from .staged import build, check_further, cifar_cfg

if TYPE_CHECKING:
    from twnn_plugin.policies import Policy
    from twnn_plugin.selection import LayerSelection

__all__ = [
    "CHOICES",
    "CONNECTION_OPTIONS",
    "DynaLayCNN3",
    "as_names",
    "dynalay_cnn3",
    "fill_missing",
    "selected",
]

CHOICES = 3
"""Decisions that a sample may make unless ``max_choices`` says otherwise."""

CONNECTION_OPTIONS = ("scale", "message", "hidden", "orthogonal", "contraction", "jacobian")
"""Options of the models' connections, those of :class:`twnn_plugin.selection.Connection` but ``steps``."""


class DynaLayCNN3(ConvNet3):
    """``cnn3`` with an agent that picks, for each image, a layer to iterate or none (Mathur & Plis 2023).

    Layer l is its convolution, norm and ReLU; the pooling after it is a step of its own, so that what is
    iterated keeps its resolution: ``z = layer(h + message(z))``. Where nothing is iterated it is ``cnn3``,
    bit for bit, and ``cnn3``'s checkpoints load.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        widths: channels of the three layers.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.
        last_pool: whether layer 3 is pooled, too, as in ``cnn3``.
        fpi_layers: names of the layers that can be iterated, of ``layer1``, ``layer2``, ``layer3``; None: all
            ("Model 3" of the paper); (): none ("Model 0"), and ``selection`` is None.
        policy: registered name or instance: who iterates what; None: ``"dynalay"``.
        max_choices: decisions an image may make.
        open_head: whether images that iterated are answered by a classifier of their own.
        **options: those of the connections (``scale``, ``message``, ``hidden``, ``orthogonal``,
            ``contraction``, ``jacobian``), see :class:`twnn_plugin.selection.Connection`, and of the solves
            (``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm``), see :func:`twnn_plugin.fix`.

    Raises:
        UnknownNameError: a layer, policy, solver or adjoint that there is not, with the nearest name.
        OptionError: an option that there is not, or an impossible value.
        ConfigError: ``widths`` are not three whole numbers, each at least 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (32, 64, 128),
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        last_pool: bool = True,
        fpi_layers: Sequence[str] | str | None = None,
        policy: str | Policy | None = None,
        max_choices: int = CHOICES,
        open_head: bool = False,
        **options: Any,
    ):
        from twnn_plugin.blocks import SolveSettings  # importing twnn_plugin imports this module

        check_further(DynaLayCNN3, options, (*CONNECTION_OPTIONS, *SolveSettings.names()))
        super().__init__(num_classes, in_chans, widths, drop_rate, global_pool)
        # A child of the model, as all parts of the head are: the head itself is none, so that nothing tells
        # it whether the model trains.
        self.head_drop = nn.Dropout(drop_rate)
        for index, name in enumerate(self.stages, start=1):
            layer: Any = self.get_submodule(name)
            self.add_module(f"pool{index}", layer.pool if last_pool or index < 3 else nn.Identity())
            layer.pool = nn.Identity()
        names = self.stages
        self.stages = tuple(part for i, name in enumerate(names, start=1) for part in (name, f"pool{i}"))
        for index, info in enumerate(self.feature_info, start=1):
            info["module"] = f"pool{index}"
        layers = {name: self.get_submodule(name) for name in self.stages}
        example = torch.zeros(2, in_chans, 16, 16)
        self.selection = selected(
            layers, names, _Head(self), example, False, fpi_layers, policy, max_choices, open_head, **options
        )
        self.register_load_state_dict_pre_hook(fill_missing)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0: none), for both paths; the pooling stays unless given."""
        super().reset_classifier(num_classes, global_pool)
        selection: Any = dict(self.named_children()).get("selection")
        if selection is not None:
            selection.set_head(_Head(self))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return super().forward(x) if self.selection is None else self.selection(x)


class _Head(nn.Module):
    """The classifier of a staged network, as one module that shares its weights and its mode."""

    def __init__(self, net: DynaLayCNN3):
        super().__init__()
        self.global_pool, self.drop, self.fc = net.global_pool, net.head_drop, net.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.global_pool(x)))


def selected(
    layers: Mapping[str, nn.Module],
    stages: Sequence[str],
    head: nn.Module,
    example: Tensor,
    channels_last: bool,
    fpi_layers: Sequence[str] | str | None,
    policy: str | Policy | None,
    max_choices: int,
    open_head: bool,
    **options: Any,
) -> LayerSelection | None:
    """The selection of a model, from the options that its user gave.

    Args:
        layers: everything from the first stage to the head, by name and in order.
        stages: those of them that may be iterated.
        head: module from the last of them to the logits.
        example: (B, ...) input of the first.
        channels_last: whether 4-axis activations are (B, H, W, C).
        fpi_layers: what the user wants iterated; None: all of the stages.
        policy: as the user gave it.
        max_choices: likewise.
        open_head: likewise.
        **options: of connections and solves; there are no others among them.

    Returns:
        None if ``fpi_layers`` is empty.
    """
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin.backbones.given import check_flag
    from twnn_plugin.blocks import SolveSettings
    from twnn_plugin.errors import OptionError, UnknownNameError, nearest
    from twnn_plugin.policies import registry
    from twnn_plugin.selection import Connection, LayerSelection

    check_flag("open_head", open_head)
    check_flag("orthogonal", options.get("orthogonal", False))
    chosen = list(stages) if fpi_layers is None else as_names(fpi_layers)
    for name in chosen:
        if name not in stages:
            hint = nearest(str(name), list(stages))
            raise UnknownNameError(f"No layer {name!r} can be iterated.{hint} Layers: {', '.join(stages)}.")
    if not chosen:
        asked = {"policy": policy is not None, "open_head": open_head, "max_choices": max_choices != CHOICES}
        given = [*options, *(name for name, said in asked.items() if said)]
        if given:
            raise OptionError(
                f"{', '.join(given)}: no layer can be iterated (fpi_layers is empty), so that this would do "
                f"nothing. Leave it out, or name some of {', '.join(stages)}."
            )
        return None
    connection = {name: options.pop(name) for name in CONNECTION_OPTIONS if name in options}
    return LayerSelection(
        layers,
        head,
        example,
        registry.resolve("dynalay" if policy is None else policy),
        chosen,
        max_choices,
        channels_last,
        SolveSettings().changed(**options),
        Connection(**connection),
        open_head,
    )


def as_names(names: Sequence[str] | str) -> list[str]:
    """``"layer1"`` or ``"layer1,layer3"`` as a list, as the command line gives them.

    Raises:
        OptionError: neither a string nor a list.
    """
    from twnn_plugin.errors import OptionError  # importing twnn_plugin imports this module

    if isinstance(names, str):
        return [part.strip() for part in names.split(",") if part.strip()]
    if not isinstance(names, Iterable):
        raise OptionError(
            f"fpi_layers names layers, such as 'layer1,layer3' or ('layer1', 'layer3'), and () for none; got "
            f"{names!r}."
        )
    return list(names)


def fill_missing(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a plain network's checkpoint load strictly: a selection that it knows nothing of stays as it is."""
    mine = f"{prefix}selection."
    if any(key.startswith(mine) for key in state):
        return
    for name, value in module.state_dict().items():
        if name.startswith("selection."):
            state[prefix + name] = value


default_cfgs = generate_default_cfgs(
    {
        "dynalay_cnn3.untrained": cifar_cfg(
            first_conv="layer1.conv",
            classifier=("fc", "selection.open_head.fc"),  # both are left out for another num_classes
            pool_size=(4, 4),
        )
    }
)


@register_model
def dynalay_cnn3(pretrained: bool = False, **kwargs: Any) -> DynaLayCNN3:
    """Three convolutional layers, and an agent that picks which to iterate (DynaLay's network)."""
    # By forward_intermediates: the layers are not called in the order in which they are registered.
    features = {"out_indices": (0, 1, 2), "feature_cls": "getter"}
    return build(DynaLayCNN3, "dynalay_cnn3", pretrained, feature_cfg=features, **kwargs)
