"""What the zoo's classifiers share: named stages, a pooled linear head and timm's manners."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint
from torch import Tensor, nn

__all__ = ["StagedNet", "build", "check_further", "cifar_cfg", "without_features"]

_FEW = -2.0  # fresh answers are "no" at most positions
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's description of a model for 32x32 images in ten classes."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": _CIFAR_MEAN,
        "std": _CIFAR_STD,
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def build(kind: Callable[..., Any], variant: str, pretrained: bool, /, **kwargs: Any) -> Any:
    """timm's ``build_model_with_cfg``, with an error that names the option that there is not.

    Args:
        kind: class of the model; one with ``**options`` looks at them itself, see :func:`check_further`.
        variant: its registered name.
        pretrained: load published weights.
        **kwargs: options of the model, and what timm understands besides.

    Raises:
        OptionError: an option that the model does not have, with the nearest name.
    """
    from twnn_plugin.registry import check_options  # importing twnn_plugin imports this module

    def make(**options: Any) -> Any:  # timm has taken out what is its own
        check_options(variant, kind, options)
        return kind(**options)

    return build_model_with_cfg(make, variant, pretrained, **kwargs)


def check_further(kind: type, given: Iterable[str], more: Iterable[str]) -> None:
    """Refuse what a model was given as ``**options`` and has no use for.

    Args:
        kind: class of the model.
        given: the names.
        more: the options it has besides those that its class names.

    Raises:
        OptionError: an option that there is not, with the nearest name.
    """
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin.blocks.settings import check_names, option_names

    check_names(kind.__name__, given, list(dict.fromkeys([*option_names(kind), *more])))


def without_features(kind: Callable[..., Any], variant: str, pretrained: bool, /, **kwargs: Any) -> Any:
    """timm's ``build_model_with_cfg`` for a model that has no feature maps to give.

    Args:
        kind: class of the model.
        variant: its registered name.
        pretrained: load published weights.
        **kwargs: options of the model, and what timm understands besides.

    Raises:
        OptionError: ``features_only=True``, or an option that the model does not have.
    """
    from twnn_plugin.errors import OptionError  # importing twnn_plugin imports this module

    if kwargs.get("features_only"):
        raise OptionError(
            f"{variant} has no feature maps of several scales, so that features_only=True gives nothing. "
            "Leave it out and call the model itself."
        )
    return build(kind, variant, pretrained, **kwargs)


class StagedNet(nn.Module):
    """A chain of stages and a classifier, in timm's manners.

    A subclass adds its stages as children, in order, and then calls :meth:`_add_head`.

    Args:
        stages: names of the children that make up the chain.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, stages: tuple[str, ...], num_classes: int, in_chans: int, drop_rate: float):
        super().__init__()
        self.stages = stages
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        self.questions = 0
        self.answers: nn.Conv2d | None = None

    def _add_head(self, num_features: int, global_pool: str, questions: int = 0) -> None:
        self.num_features = num_features
        if isinstance(questions, bool) or not isinstance(questions, int) or questions < 0:
            from twnn_plugin.errors import OptionError  # importing twnn_plugin imports this module

            raise OptionError(f"questions must be a whole number, 0 for none; got {questions!r}.")
        self.questions = questions
        if questions:
            self.answers = nn.Conv2d(num_features, questions, 1)
            nn.init.constant_(self.answers.bias, _FEW)  # type: ignore[arg-type]
        self.reset_classifier(self.num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0: none); the pooling stays unless one is given."""
        self.num_classes = num_classes
        pool = str(self.global_pool.pool_type if global_pool is None else global_pool)
        weight = next(self.parameters())
        pooled = self.questions or self.num_features
        head = create_classifier(pooled, num_classes, pool_type=pool)
        self.head_hidden_size = pooled * head[0].feat_mult()
        self.global_pool, self.fc = (part.to(weight.device, weight.dtype) for part in head)

    def _stage(self, name: str, x: Tensor) -> Tensor:
        module = self.get_submodule(name)
        return checkpoint(module, x) if self.grad_checkpointing and self.training else module(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to features (B, num_features, H', W')."""
        for name in self.stages:
            x = self._stage(name, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after the stages that ``feature_info`` names, as in timm.

        Args:
            x: (B, in_chans, H, W) images.
            indices: which; the last n if a number, all if ``None``.
            norm: there is no further norm to apply; ignored.
            stop_early: do not run the stages after the last wanted one.
            output_fmt: ``"NCHW"``.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}.")
        taps = [info["module"] for info in self.feature_info]
        wanted = _wanted(len(taps), indices)
        found = []
        for name in self.stages:
            x = self._stage(name, x)
            if name in taps and taps.index(name) in wanted:
                found.append(x)
            if stop_early and name == taps[max(wanted)]:
                break
        return found if intermediates_only else (x, found)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to what the classifier is given."""
        return self.classify(x if self.answers is None else self.answers(x), pre_logits)

    def classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The head without :attr:`answers`: pooling, dropout and the classifier."""
        x = self.global_pool(x)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _wanted(taps: int, indices: int | list[int] | None) -> list[int]:
    """The positions among ``taps`` that ``indices`` means, counted from 0."""
    if indices is None:
        return list(range(taps))
    chosen = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not chosen or not all(-taps <= index < taps for index in chosen):
        raise ValueError(f"There are {taps} intermediate features, numbered from 0; got {indices!r}.")
    return [index % taps for index in chosen]
