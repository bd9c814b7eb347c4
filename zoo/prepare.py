"""What a run needs before its first update: where it starts, its model, its batches, its kernels."""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .build import load_weights
from .checkpoint import LAST, load_checkpoint
from .config import TrainConfig, check_same_run
from .construct import AnyBatches, AnyData, construct, text_batches
from .data import Batches, DataSplits, make_transform
from .data.batches import Transform
from .data.text import TextSplits
from .distributed import World
from .errors import CheckpointError, ConfigError, DataError

__all__ = [
    "check_parts",
    "kernels",
    "make_mixup",
    "prepare_model",
    "resume_path",
    "starting_point",
    "train_batches",
]


def resume_path(config: TrainConfig) -> Path | None:
    """The checkpoint that ``config.resume`` means; ``None`` to begin anew.

    Raises:
        ConfigError: ``auto`` without ``output``, or an ``output`` that already holds a run.
        CheckpointError: the file that was named does not exist.
    """
    output = None if config.output is None else Path(config.output)
    if config.resume is None:
        if output is not None and (output / LAST).exists():
            raise ConfigError(
                f"The folder {output} already holds a run. Go on with it (--resume auto), or choose another "
                "--output."
            )
        return None
    if config.resume == "auto":
        if output is None:
            raise ConfigError(
                "--resume auto looks for a checkpoint in the folder of --output; give that too."
            )
        return output / LAST if (output / LAST).exists() else None
    path = Path(config.resume)
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint {path} to resume from. Give --resume another one, or a run's folder."
        )
    if output is not None and output.resolve() != path.parent.resolve():
        raise ConfigError(
            f"A resumed run goes on in its own folder {path.parent}, not in {output}. "
            "Leave --output out, or copy the whole folder first."
        )
    return path


def starting_point(config: TrainConfig) -> tuple[tuple[dict[str, Any], Path] | None, TrainConfig]:
    """The checkpoint to go on from with its path, or ``None``, and the settings with the folder filled in."""
    path = resume_path(config)
    if path is None:
        return None, config
    state = load_checkpoint(path)
    check_same_run(state["config"], config, path)
    return (state, path), replace(config, output=str(path.parent))


def check_parts(data: AnyData) -> None:
    """Refuse data that there is nothing to train on, or nothing to choose an epoch by.

    Raises:
        DataError: the training or the validation part is empty.
    """
    for part, name in (("train", "training"), ("val", "validation")):
        if not len(data.part(part)):
            raise DataError(
                f"The {name} part of {data.spec.name!r} is empty, and a run needs it. Give more data."
            )


def prepare_model(config: TrainConfig, data: AnyData, model: nn.Module | None, here: World) -> nn.Module:
    """The model on its device: the same weights in every process, its own random numbers in each."""
    from timm.utils import random_seed

    random_seed(config.seed)  # the same weights in every process
    if model is None:
        model = construct(
            config.model, data, config.model_kwargs, config.pretrained, config.policy, config.policy_kwargs
        )
    if config.initial_checkpoint is not None:
        load_weights(model, config.initial_checkpoint)
    random_seed((config.seed + here.rank) % 2**32)  # but each its own dropout and mixing
    return model.to(here.device)


@contextmanager
def kernels(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Deterministic GPU kernels inside; the global switches are put back afterwards."""
    if not deterministic or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def train_batches(config: TrainConfig, data: AnyData, here: World) -> AnyBatches:
    """Shuffled training batches of this process, augmented if the settings ask for it."""
    if isinstance(data, TextSplits):
        return text_batches(data, config, here)
    augment: dict[str, Any] = {
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter or None,
        "auto_augment": config.aa,
        "re_prob": config.reprob,
    }
    transform = None
    if config.train_crop_mode or any(augment.values()):
        crop: dict[str, Any] = {"train_crop_mode": config.train_crop_mode}
        if config.train_crop_mode is None:  # timm's training transform always crops; this is the whole image
            crop = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        transform = _training_transform(data, config, {**augment, **crop})
    return Batches(
        data.train,
        data.spec,
        config.batch_size,
        transform=transform,
        shuffle=True,
        drop_last=True,
        seed=config.seed,
        workers=config.workers,
        rank=here.rank,
        world_size=here.size,
        pinned=here.device.type == "cuda",
    )


def _training_transform(data: DataSplits, config: TrainConfig, augment: dict[str, Any]) -> Transform:
    """timm's transform; :class:`ConfigError` for an AutoAugment policy that it cannot read."""
    try:
        return make_transform(data.spec, **augment)
    except (AssertionError, ValueError, LookupError, TypeError) as error:  # timm checks with assert
        if config.aa is None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--aa {config.aa!r} is no policy that timm can read ({reason}). Give one such as "
            "rand-m9-mstd0.5, augmix-m3-w3, 3a, original or v0."
        ) from error


def make_mixup(config: TrainConfig, classes: int) -> Any:
    """Mixup and cutmix of timm, or ``None``; they bring the label smoothing with them."""
    if not (config.mixup or config.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )
