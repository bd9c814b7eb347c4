"""Residual networks for 32x32 images whose stages integrate a differential equation.

``hamiltonian_*``, ``antisymmetric_*`` and ``euler_*``: the propagators of :mod:`twnn_plugin.blocks` as
stages, laid out as in Chang et al. (2018), "Reversible architectures for arbitrarily deep residual
neural networks": a stem, then stages of constant width with pooling and a wider convolution between them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .staged import StagedNet, build, cifar_cfg

__all__ = [
    "PropagationNet",
    "antisymmetric_20",
    "antisymmetric_50",
    "euler_20",
    "euler_50",
    "hamiltonian_20",
    "hamiltonian_50",
]

_BLOCKS = {"euler": "euler", "antisymmetric": "antisymmetric", "hamiltonian": "verlet"}


class PropagationNet(StagedNet):
    """A 3x3 stem and three stages of ``depth`` propagation layers each: ``3 * depth + 2`` layers.

    Between stages, 2x2 average pooling and a 1x1 convolution with batch norm. Within a stage there is no
    normalisation, which would undo what the propagator keeps: each goes on for the same ``time``, so that a
    deeper network takes smaller steps through the same equation.

    Args:
        kind: ``"euler"``, ``"antisymmetric"`` or ``"hamiltonian"``.
        depth: layers in each stage, >= 1.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        widths: channels of the three stages, each at least 2 for ``"hamiltonian"``.
        time: of each stage, > 0; the step is ``time / depth``.
        act_layer: timm's name of an activation, or the class of one.
        shared: whether the layers of a stage share their weights.
        gamma: damping of ``"antisymmetric"``, >= 0.
        reversible: for ``"hamiltonian"``, keep no states within a stage for the backward pass.
        drop_rate: dropout before the classifier.
        global_pool: timm's pooling type.

    Raises:
        OptionError: an option out of range, or one that this kind does not have.
    """

    def __init__(
        self,
        kind: str = "hamiltonian",
        depth: int = 6,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        time: float = 3.0,
        act_layer: str | Callable[[], nn.Module] = "tanh",
        shared: bool = False,
        gamma: float | None = None,
        reversible: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__(("stem", "layer1", "layer2", "layer3"), num_classes, in_chans, drop_rate)
        options = _options(kind, depth, time, gamma, reversible)
        act = _activation(act_layer)
        make = _propagator(kind)
        widths = _channels(widths)
        stem = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=stem, bn=nn.BatchNorm2d(widths[0]), act=act()))
        before, reduction = widths[0], 1
        for index, (name, width) in enumerate(zip(self.stages[1:], widths, strict=True)):
            body = make(width, depth, activation=act(), kernel_size=3, shared=shared, **options)
            reduction *= 2 if index else 1
            parts = {"enter": _enter(before, width), "body": body} if index else {"body": body}
            self.add_module(name, nn.Sequential(OrderedDict(parts)))
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": name})
            before = width
        self._add_head(before, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _propagator(kind: str) -> Callable[..., nn.Module]:
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin import blocks

    return blocks.get(_BLOCKS[kind])


def _options(
    kind: str, depth: int, time: float, gamma: float | None, reversible: bool
) -> dict[str, float | bool]:
    """What is given to the propagators of this kind alone, and their step."""
    from twnn_plugin.errors import OptionError, nearest

    if kind not in _BLOCKS:
        raise OptionError(
            f"kind must be one of {', '.join(_BLOCKS)}; got {kind!r}.{nearest(str(kind), _BLOCKS)}"
        )
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise OptionError(f"depth must be at least 1 layer a stage; got {depth!r}.")
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 < time < float("inf"):
        raise OptionError(f"time must be a finite number > 0; got {time!r}.")
    options: dict[str, float | bool] = {"h": time / depth}
    if gamma is not None:
        if kind != "antisymmetric":
            raise OptionError(f"gamma damps antisymmetric networks; this one is {kind!r}.")
        options["gamma"] = gamma
    if reversible:
        if kind != "hamiltonian":
            raise OptionError(f"Only hamiltonian networks can be undone: {kind!r} has no reversible=True.")
        options["reversible"] = reversible
    return options


def _channels(widths: Any) -> tuple[int, int, int]:
    from twnn_plugin.errors import OptionError

    listed = isinstance(widths, Sequence) and len(widths) == 3
    if not listed or not all(type(width) is int and width >= 1 for width in widths):
        raise OptionError(
            "widths are the channels of the three stages, whole numbers of at least 1 such as (16, 32, 64); "
            f"got {widths!r}."
        )
    first, second, third = widths
    return first, second, third


def _activation(layer: str | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    from twnn_plugin.errors import OptionError

    try:
        found = get_act_layer(layer)  # type: ignore[arg-type]
    except KeyError:
        found = None
    if found is None:
        raise OptionError(
            f"act_layer must be a name that timm knows, such as 'tanh' or 'silu'; got {layer!r}."
        )
    return found


def _enter(before: int, width: int) -> nn.Sequential:
    """Half the size, another width."""
    conv = nn.Conv2d(before, width, 1, bias=False)
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2), conv=conv, bn=nn.BatchNorm2d(width)))


_DEPTHS = {20: 6, 50: 16}

default_cfgs = generate_default_cfgs(
    {f"{kind}_{n}.untrained": cifar_cfg(first_conv="stem.conv") for kind in _BLOCKS for n in _DEPTHS}
)


def _create(kind: str, layers: int, pretrained: bool, /, **kwargs: Any) -> PropagationNet:
    from twnn_plugin.errors import OptionError  # importing twnn_plugin imports this module

    if kwargs.setdefault("kind", kind) != kind:
        raise OptionError(
            f"{kind}_{layers} is of the kind {kind!r}; got kind={kwargs['kind']!r}. Create one of the other "
            f"names: {', '.join(f'{other}_{layers}' for other in _BLOCKS if other != kind)}."
        )
    options = {"depth": _DEPTHS[layers], **kwargs}
    return build(
        PropagationNet, f"{kind}_{layers}", pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **options
    )


@register_model
def euler_20(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Plain explicit Euler, six layers a stage, 0.29 million parameters."""
    return _create("euler", 20, pretrained, **kwargs)


@register_model
def euler_50(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Plain explicit Euler, 16 layers a stage, 0.78 million parameters."""
    return _create("euler", 50, pretrained, **kwargs)


@register_model
def antisymmetric_20(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Explicit Euler with antisymmetric kernels, six layers a stage, 0.29 million parameters."""
    return _create("antisymmetric", 20, pretrained, **kwargs)


@register_model
def antisymmetric_50(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Explicit Euler with antisymmetric kernels, 16 layers a stage, 0.78 million parameters."""
    return _create("antisymmetric", 50, pretrained, **kwargs)


@register_model
def hamiltonian_20(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Verlet steps of a Hamiltonian system, six layers a stage, 77 thousand parameters."""
    return _create("hamiltonian", 20, pretrained, **kwargs)


@register_model
def hamiltonian_50(pretrained: bool = False, **kwargs: Any) -> PropagationNet:
    """Verlet steps of a Hamiltonian system, 16 layers a stage, 0.2 million parameters."""
    return _create("hamiltonian", 50, pretrained, **kwargs)
