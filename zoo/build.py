"""Models by name for a data set, with errors that a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

import twnn_plugin  # noqa: F401  (registers our models with timm)
from twnn_plugin.errors import AttachError, MapError, UnknownNameError, nearest

from .checkpoint import read_weights
from .data import DataSpec
from .errors import CheckpointError, ConfigError, ZooError

__all__ = ["build_model", "create", "fill_in", "load_weights"]

# timm resolves these itself: weights on a hub or in a folder
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")


def build_model(
    name: str, spec: DataSpec, model_kwargs: Mapping[str, Any] | None = None, pretrained: bool = False
) -> nn.Module:
    """``timm.create_model`` for the images and classes of ``spec``, checked with a forward pass.

    Args:
        name: any registered name, ours or timm's.
        spec: gives ``num_classes`` and ``in_chans`` unless ``model_kwargs`` does.
        model_kwargs: options of the model.
        pretrained: load published weights.

    Raises:
        ConfigError: unknown name, an option the model does not take, or images it cannot take.
    """
    if not name.startswith(_REMOTE) and not timm.is_model(name):
        raise ConfigError(
            f"Unknown model {name!r}.{nearest(name.split('.')[0], timm.list_models())} "
            "See 'twnn list models' and timm.list_models()."
        )
    options = {"num_classes": spec.num_classes, "in_chans": spec.in_chans, **(model_kwargs or {})}
    model = create(name, pretrained, options)
    _check_fit(name, model, spec)
    return model


def create(name: str, pretrained: bool = False, options: Mapping[str, Any] | None = None) -> nn.Module:
    """``timm.create_model`` with an error of one line where the model cannot be built.

    Args:
        name: a registered name.
        pretrained: load published weights.
        options: of the model.

    Raises:
        ConfigError: an option that the model does not take or a value that it cannot be built with, or there
            are no published weights, or they are of a model with other options, or the files of the model
            cannot be read or fetched.
        UnknownNameError, AttachError, MapError: see there.
    """
    try:
        return timm.create_model(name, pretrained=pretrained, **(options or {}))
    except (ZooError, UnknownNameError, AttachError, MapError):
        raise  # they say what to do
    except (OSError, SafetensorError, UnpicklingError, KeyError) as error:  # of files and of networks
        if isinstance(error, KeyError) and not name.startswith(_REMOTE):
            raise  # not of a config.json that lacks an entry
        raise ConfigError(
            f"The files of the model {name!r} cannot be read or fetched ({_reason(error)}). Check its name "
            "or path, and that the hub it comes from can be reached."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        given = {key: _short(value) for key, value in (options or {}).items()}
        weights = " with its published weights" if pretrained else ""
        reason = str(error).strip() or type(error).__name__
        raise ConfigError(
            f"The model {name!r} cannot be built{weights} from these options ({given}): {reason}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what ``error`` says: those of hubs go on with addresses and advice of their own."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0].strip()[:200]}" if said else type(error).__name__


def _short(value: Any) -> Any:
    """A module by its name: its whole structure would hide the message."""
    return type(value).__name__ if isinstance(value, nn.Module) else value


def _check_fit(name: str, model: nn.Module, spec: DataSpec) -> None:
    """One forward pass in eval mode: a wrong image size should fail before the data is touched."""
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *spec.input_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The model {name!r} does not take images of {spec.input_size}, as {spec.name!r} gives them: "
            f"{reason}. Deliver another size (--img-size), or build the model for this one if it has "
            f"such an option (--model-kwargs img_size={spec.img_size})."
        ) from error
    finally:
        model.train(was_training)
    if logits.shape != (2, spec.num_classes):
        raise ConfigError(
            f"The model {name!r} gives an output of shape {tuple(logits.shape)} for 2 images; "
            f"classification of {spec.name!r} needs {(2, spec.num_classes)}."
        )


def load_weights(model: nn.Module, path: str | Path, use_ema: bool = True) -> None:
    """Load the weights in ``path`` into ``model``, all of them and no others.

    Raises:
        CheckpointError: the file is not readable, or belongs to another model.
    """
    weights, _ = read_weights(Path(path), use_ema)
    fill_in(model, weights, path)


def fill_in(model: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    """``load_state_dict`` with an error that names the file."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # TypeError: not a mapping
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[1:3] or lines)[:300]
        raise CheckpointError(
            f"The weights in {path} do not fit this model: {said} "
            "Build the model with the options it was trained with."
        ) from None
