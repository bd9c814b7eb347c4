"""Data, batches and models by name, whatever the data are: images or text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.errors import nearest
from twnn_plugin.policies.base import Policy, SelectionPolicy, SpanPolicy
from twnn_plugin.policies.oracle import OraclePolicy

from .build import build_model, create
from .config import TrainConfig
from .data import Batches, DataSplits, load_data
from .data.text import TextBatches, TextSplits, load_text
from .data.text_specs import TEXTS, TextSpec, is_text
from .distributed import World
from .errors import ConfigError, DataError
from .models import TEXT

__all__ = [
    "AnyBatches",
    "AnyData",
    "construct",
    "default_model",
    "find_data",
    "plain_batches",
    "text_batches",
]

AnyData = DataSplits | TextSplits

IMAGE_SETTINGS = (
    *("img_size", "mixup", "cutmix", "hflip", "vflip", "color_jitter", "aa", "reprob", "train_crop_mode"),
)
TEXT_SETTINGS = ("text_level", "text_length", "vocab_size")


class AnyBatches(Protocol):
    """What :class:`~zoo.data.Batches` and :class:`~zoo.data.text.TextBatches` have in common."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``epoch`` from number ``start`` on."""
        ...


def default_model(dataset: str, policy: str | None) -> str | None:
    """The model to take where none was named; None: the usual one for images."""
    if is_text(dataset):
        return "lstm3" if policy is None else "dynalay_lstm3"
    if policy is not None and policy in tw.policies.names():
        factory = tw.policies.get(policy)
        if isinstance(factory, type) and issubclass(factory, SelectionPolicy):
            return "dynalay_cnn3"
    return None


def find_data(config: TrainConfig) -> AnyData:
    """The data set that ``config`` names.

    Raises:
        ConfigError: unknown name, or a setting of images for a text or the other way round.
        DataError: it is not there.
    """
    text = is_text(config.dataset)
    plain = TrainConfig()
    for name in IMAGE_SETTINGS if text else TEXT_SETTINGS:
        if getattr(config, name) != getattr(plain, name):
            kind, other = ("a text", "images") if text else ("a set of images", "texts")
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {other}; {config.dataset!r} is {kind}. Leave it out."
            )
    if text:
        return load_text(
            config.dataset,
            config.data_dir,
            config.dataset_download,
            level=config.text_level,
            vocab_size=config.vocab_size,
            length=config.text_length,
        )
    try:
        return load_data(config.dataset, config.data_dir, config.dataset_download, config.img_size)
    except DataError:
        raise
    except ConfigError as error:
        near = nearest(config.dataset.lower().replace("_", "-"), TEXTS)
        known = str(error).startswith("Unknown data set")
        more = f"{'' if 'Did you mean' in str(error) else near} Texts: {', '.join(TEXTS)}."
        raise ConfigError(f"{error}{more}" if known else str(error)) from None


def text_batches(data: TextSplits, config: TrainConfig, here: World) -> TextBatches:
    """Shuffled training batches of this process."""
    return TextBatches(
        data.train,
        config.batch_size,
        shuffle=True,
        drop_last=True,
        seed=config.seed,
        rank=here.rank,
        world_size=here.size,
    )


def plain_batches(data: AnyData, part: str, batch_size: int, workers: int, here: World) -> AnyBatches:
    """The rows of a part in order, for evaluation."""
    if isinstance(data, TextSplits):
        return TextBatches(data.part(part), batch_size, rank=here.rank, world_size=here.size)
    return Batches(
        data.part(part),
        data.spec,
        batch_size,
        workers=workers,
        rank=here.rank,
        world_size=here.size,
        pinned=here.device.type == "cuda",
    )


def construct(
    name: str,
    data: AnyData,
    model_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    policy: str | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """``timm.create_model`` for the data at hand, checked with a forward pass.

    Args:
        name: any registered model.
        data: gives the number of classes, and channels or tokens.
        model_kwargs: options of the model.
        pretrained: load published weights.
        policy: registered name of who is iterated; None: the model's own default.
        policy_kwargs: its options.

    Raises:
        ConfigError: unknown name, an option the model does not take, or data it does not take.
        UnknownNameError, OptionError: no such policy, or not with these options.
    """
    options = dict(model_kwargs or {})
    if policy is not None:
        if "policy" in options:
            raise ConfigError("The policy is named twice, by --policy and among the model's options.")
        made = tw.policy(policy, **(policy_kwargs or {}))
        _check_policy(name, policy, made)
        options["policy"] = made
    if isinstance(data, TextSplits):
        return _text_model(name, data.spec, options)
    if name in TEXT:
        raise ConfigError(f"{name} reads text, and {data.spec.name!r} is images. Texts: {', '.join(TEXTS)}.")
    return build_model(name, data.spec, options, pretrained)


def _check_policy(name: str, policy: str, made: Policy) -> None:
    """Refuse a policy that the model has no use for."""
    if not timm.is_model(name):
        return  # build_model says it better
    if isinstance(made, OraclePolicy):
        raise ConfigError(
            "Policy 'oracle' must be told the labels of what it is given, and is for analysis in Python "
            "alone: see twnn_plugin.selection.foreseen. Take dynalay, entropy, random, always or never."
        )
    if not name.startswith(("dynalay_", "twnn_")):
        other = next((n for n in (f"dynalay_{name}", f"twnn_{name}") if timm.is_model(n)), None)
        way = f"Take {other!r}" if other else "Take a dynalay_ or twnn_ model"
        raise ConfigError(
            f"The model {name!r} has nothing that could be iterated, so that policy {policy!r} would do "
            f"nothing. {way}, or leave --policy out."
        )
    if name.startswith("dynalay_") and _for_spans(made):
        raise ConfigError(
            f"Policy {policy!r} decides about single spans; {name!r} needs one that picks layers."
        )
    if name.startswith("twnn_") and isinstance(made, SelectionPolicy):
        raise ConfigError(
            f"Policy {policy!r} picks among the layers of a network; {name!r} has single spans. Take a model "
            "named dynalay_..., or policy gate, always, never or random."
        )


def _for_spans(policy: Policy) -> bool:
    return isinstance(policy, SpanPolicy)


def _text_model(name: str, spec: TextSpec, options: dict[str, Any]) -> nn.Module:
    if name not in TEXT:
        raise ConfigError(
            f"The model {name!r} does not read text, and {spec.name!r} is one.{nearest(name, TEXT)} Models "
            f"of text: {', '.join(TEXT)}."
        )
    given = {
        "num_classes": spec.num_classes,
        "vocab_size": spec.vocab_size,
        "task": spec.task,
        **options,
    }
    model = create(name, options=given)
    with torch.no_grad():
        last = (spec.vocab_size or 1) - 1  # a vocabulary that is too short should fail now
        logits = model.eval()(torch.full((2, spec.length), last))
    wanted = (2, spec.num_classes, spec.length) if spec.task == "language" else (2, spec.num_classes)
    if logits.shape != wanted:
        raise ConfigError(
            f"The model {name!r} gives logits of shape {tuple(logits.shape)} for 2 texts; {spec.name!r} "
            f"needs {wanted}. Leave num_classes and task out of --model-kwargs: the data set gives them."
        )
    return model.train()
