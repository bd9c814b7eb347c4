"""The idx format of MNIST and its relatives, plain or gzipped.

torchvision reads idx only unpacked and inside its own ``raw/`` folder; packages such as Debian's
``dataset-fashion-mnist`` ship the four ``.gz`` files flat. Reading them in place needs no copy.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import DataError

__all__ = ["find_idx_file", "has_idx_files", "read_idx", "read_idx_pair"]

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UBYTE = 0x08  # the type code of unsigned bytes, the third byte of the file


def find_idx_file(folder: Path, stem: str) -> Path | None:
    """``folder/stem`` or ``folder/stem.gz``, whichever exists."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def has_idx_files(folder: Path) -> bool:
    """Whether all four files of a set lie flat in ``folder``."""
    return all(find_idx_file(folder, stem) for pair in _STEMS.values() for stem in pair)


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, of the shape its header states.

    Raises:
        DataError: the file is not idx, not of bytes, or shorter or longer than its header says.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {path}: {error}. Fetch the file again.") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UBYTE or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an idx file of unsigned bytes (its first bytes are {raw[:4]!r}).")
    rank = raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=rank, offset=4))
    body = len(raw) - 4 - 4 * rank
    if body != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {shape}, {math.prod(shape)} bytes, but {body} follow. "
            "Fetch the file again."
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_idx_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W) uint8 and labels (N,) uint8 of ``"train"`` or ``"test"``."""
    paths = [find_idx_file(folder, stem) for stem in _STEMS[split]]
    if None in paths:
        raise DataError(f"No {' and '.join(_STEMS[split])} (plain or .gz) in {folder}.")
    images, labels = (read_idx(path) for path in paths if path is not None)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(
            f"The {split} files in {folder} do not belong together: images {images.shape}, "
            f"labels {labels.shape}."
        )
    return images, labels
