"""Checkpoints that are whole or absent: written aside, synced, then renamed into place."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import TrainConfig
from .errors import CheckpointError, ConfigError

__all__ = [
    "BEST",
    "LAST",
    "load_checkpoint",
    "read_weights",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "settings_of",
]

LAST, BEST = "last.pth.tar", "best.pth.tar"
FORMAT = 1
_RUN_KEYS = ("format", "config", "epoch", "step_in_epoch", "updates", "state_dict", "optimizer", "rng")


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` to ``path`` so that a kill at any moment leaves the old file or the new one.

    Raises:
        CheckpointError: the folder cannot be written to or is full; an older ``path`` is untouched.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        aside.unlink(missing_ok=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {path}: {error}. Is the disk full? An older one is untouched."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; not every system can open a folder."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. Give a file such as RUN/{LAST} or RUN/{BEST}.")
    try:
        _check_sums(path)
        state = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, KeyError):  # of the unpickler, which says the number of a byte and no more
            reason = "its bytes are not those of a checkpoint"
        raise CheckpointError(
            f"{path} is not a readable checkpoint: corrupt, truncated, or not weights only ({reason[:160]}). "
            "Nothing was overwritten; take another file."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the dict of a checkpoint.")
    return state


def _check_sums(path: Path) -> None:
    """Hold the archive's members against their checksums, which ``torch.load`` does not do."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
    if bad is not None:
        raise ValueError(f"its part {bad} does not match its checksum")


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def load_checkpoint(path: Path, keys: Sequence[str] = _RUN_KEYS) -> dict[str, Any]:
    """The state of a run as :func:`save_checkpoint` wrote it, on the CPU.

    Args:
        path: the file.
        keys: what it must hold.

    Raises:
        CheckpointError: missing, corrupt, or not written by a training run of ours, or with settings that
            no run can have.
    """
    state = _read(path)
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} cannot be resumed: it has no {', '.join(missing)}. It may hold bare weights; "
            "start from them with --initial-checkpoint."
        )
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}; this version reads format {FORMAT}.")
    if "config" in keys:
        settings_of(state["config"], path)
    return state


def _check_weights(weights: Any, path: Path) -> None:
    """``CheckpointError`` unless ``weights`` is a state dict."""
    is_dict = isinstance(weights, Mapping) and bool(weights)
    if not is_dict or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path} holds no weights: expected a state dict, names with tensors, alone or under "
            f"'state_dict'; found a {type(weights).__name__}. Take another file."
        )


def read_weights(path: Path, use_ema: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Weights for evaluation or a new run, from our checkpoints, timm's, or a bare state dict.

    Args:
        path: the file.
        use_ema: take the moving average where the file has one.

    Returns:
        The state dict, and the settings of the run if the file carries them.

    Raises:
        CheckpointError: missing, corrupt, or without weights.
    """
    state = _read(path)
    weights = (state.get("state_dict_ema") if use_ema else None) or state.get("state_dict", state)
    _check_weights(weights, path)
    config = state.get("config")
    return weights, config if isinstance(config, dict) else None


def settings_of(saved: Mapping[str, Any], path: Path) -> TrainConfig:
    """The settings of the run that wrote ``path``, as found in it.

    Raises:
        CheckpointError: some setting does not exist or has an impossible value.
    """
    try:
        return TrainConfig.from_dict(saved)
    except ConfigError as error:
        raise CheckpointError(f"The settings in {path} are not those of a run: {error}") from None


def rng_state(device: torch.device) -> dict[str, Any]:
    """The random state of Python, NumPy, torch and, on a GPU, of the device, as plain values and tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the random state of :func:`rng_state` back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    key = saved["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
