"""Reader of the deep-thinking benchmark's own files (Schwarzschild et al. 2021, ``easy-to-hard-data``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .examples import SPLITS, Examples, as_float
from .mazes import pixels_of

__all__ = ["read_examples"]

_TRAINED_ON = 0.8  # the benchmark's share of training data; the rest is its validation data
_NUMBERS = "biuf"  # kinds of NumPy's types


def read_examples(task: str, data_dir: str | Path, size: int, split: str) -> Examples:
    """Examples from the benchmark's files.

    Prefix sums: ``prefix_sums_data/N_data.pth`` and ``N_targets.pth``, (M, N) of 0 and 1; in an older layout
    they lie in ``prefix_sums_data/len_N``. Mazes: ``maze_data_train_S`` or ``maze_data_test_S`` with
    ``inputs.npy`` (M, 3, P, P) and ``solutions.npy`` (M, P, P). Training data are the first 80 % of a set,
    validation data the rest; for prefix sums, of which there is one set a length, test data are the whole
    set.

    Args:
        task: ``"prefix_sums"`` or ``"mazes"``.
        data_dir: the benchmark's root folder, or the folder of the files themselves.
        size: bits, or units along a side.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        DataError: files are missing, unreadable, of other shapes or values, or too few for the split.
        ConfigError: the benchmark has no such task.
    """
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}. Splits: {', '.join(SPLITS)}.")
    root = Path(data_dir).expanduser()
    if task == "prefix_sums":
        found = _prefix_sums(root, size)
    elif task == "mazes":
        found = _mazes(root, size, "test" if split == "test" else "train")
    else:
        raise ConfigError(f"The deep-thinking benchmark has prefix_sums and mazes; got {task!r}.")
    part = _part(found, split)
    if not len(part):
        raise DataError(
            f"The files of {task}, size {size}, in {root} hold {len(found)} example(s), and so none for the "
            f"split {split!r}. Take a larger set, or leave --data-dir out to generate examples."
        )
    return part


def _part(examples: Examples, split: str) -> Examples:
    cut = int(_TRAINED_ON * len(examples))
    if split == "test":
        return examples
    return examples[slice(0, cut)] if split == "train" else examples[slice(cut, None)]


def _prefix_sums(root: Path, bits: int) -> Examples:
    base, length = Path("prefix_sums_data"), f"len_{bits}"
    folder = _find(root, (base, base / length, Path(length)), f"{bits}_data.pth")
    data = _load_torch(folder / f"{bits}_data.pth")
    targets = _load_torch(folder / f"{bits}_targets.pth")
    if data.dim() != 2 or data.shape[1] != bits or targets.shape != data.shape:
        raise DataError(
            f"{folder} should hold two (M, {bits}); got {tuple(data.shape)} and {tuple(targets.shape)}."
        )
    _check_binary(folder / f"{bits}_data.pth", data)
    _check_binary(folder / f"{bits}_targets.pth", targets)
    data = data.float()
    return Examples(data[:, None], targets.long(), {"ones": data.sum(dim=1)})


def _mazes(root: Path, size: int, part: str) -> Examples:
    folder = _find(root, (Path(f"maze_data_{part}_{size}"),), "inputs.npy")
    inputs, targets = _load_numpy(folder / "inputs.npy"), _load_numpy(folder / "solutions.npy")
    pixels = pixels_of(size)
    if inputs.shape[1:] != (3, pixels, pixels) or targets.shape != (len(inputs), pixels, pixels):
        raise DataError(
            f"{folder} should hold arrays (M, 3, {pixels}, {pixels}) and (M, {pixels}, {pixels}); got "
            f"{inputs.shape} and {targets.shape}."
        )
    images, labels = as_float(inputs), as_float(targets)
    if not bool(images.isfinite().all()):
        raise DataError(f"{folder / 'inputs.npy'} should hold colours, 0 to 1; some are not finite.")
    _check_binary(folder / "solutions.npy", labels)
    labels = labels.long()
    # A path of n steps from cell to cell covers 2 n + 1 units of four pixels.
    length = (labels.flatten(1).sum(dim=1) / 4 - 1) / 2
    return Examples(images, labels, {"path": length.float()})


def _find(root: Path, places: Sequence[Path], file: str) -> Path:
    """The folder that holds ``file``: one of ``places`` in ``root``, or ``root`` itself."""
    for folder in (*(root / place for place in places), root):
        if (folder / file).is_file():
            return folder
    looked = " or ".join(str(place / file) for place in places)
    raise DataError(f"There is no {looked} in {root}; give the folder that holds {places[0]}.")


def _load_torch(path: Path) -> Tensor:
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler makes of another file's bytes may be any exception
        raise DataError(
            f"{path} cannot be read as a tensor that torch.save wrote: {_first_line(error)}"
        ) from None
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
        kind = f"{value.layout}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{path} should hold a plain tensor of numbers; it holds a {kind}.")
    return value


def _load_numpy(path: Path) -> np.ndarray:
    try:
        value: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in _NUMBERS:
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{path} should hold an array of numbers; it holds an {kind}.")
    return value


def _check_binary(path: Path, values: Tensor) -> None:
    """``DataError`` if anything is neither 0 nor 1, which a model of two classes can never be right about."""
    wrong = values[(values != 0) & (values != 1)]
    if wrong.numel():
        raise DataError(
            f"{path} should hold 0 and 1 alone; {wrong.numel():,} of {values.numel():,} values are others, "
            f"such as {wrong[0].item():g}."
        )


def _first_line(error: Exception) -> str:
    """The first line of a message; a key or a number alone says nothing without the kind of error."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()
