"""The table of data sets: shapes, classes and normalisation, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from twnn_plugin.errors import nearest

from ..errors import ConfigError

__all__ = ["SPECS", "DataSpec", "dataset_names", "parse_dataset"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSpec:
    """What a model must know about a data set.

    Attributes:
        name: what users type after ``--dataset``.
        num_classes: number of labels; 0 until an image folder has been read.
        in_chans: channels of an image.
        img_size: height and width in pixels as delivered to the model.
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        source: one line for listings.
    """

    name: str
    num_classes: int
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str = ""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.in_chans, self.img_size, self.img_size)

    def resized(self, img_size: int | None) -> DataSpec:
        """The same data delivered at another size; ``None`` keeps the size."""
        return self if img_size is None else replace(self, img_size=img_size)


SPECS = {
    spec.name: spec
    for spec in (
        DataSpec("digits", 10, 1, 8, (0.3053,), (0.3760,), "1,797 scanned digits inside scikit-learn"),
        DataSpec(
            "cued_digits", 10, 1, 20, (0.1119,), (0.2820,), "scikit-learn's digits in clutter, one marked"
        ),
        DataSpec("mnist", 10, 1, 28, (0.1307,), (0.3081,), "70,000 handwritten digits, torchvision"),
        DataSpec("fashion_mnist", 10, 1, 28, (0.2860,), (0.3530,), "70,000 clothes, torchvision or Debian"),
        DataSpec("cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "60,000 photos"),
        DataSpec("cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "60,000 photos"),
        DataSpec("folder", 0, 3, 224, _IMAGENET_MEAN, _IMAGENET_STD, "images, one subfolder a class"),
    )
}


def dataset_names() -> list[str]:
    """Names that ``--dataset`` takes."""
    return list(SPECS)


def parse_dataset(name: str, data_dir: str | None) -> tuple[DataSpec, Path | None]:
    """The spec and the folder that ``name`` and ``data_dir`` mean together.

    Args:
        name: a name of the table, the same after timm's prefix ``torch/``, or a path to an image folder.
        data_dir: where the set is, or ``None``.

    Raises:
        ConfigError: unknown name, a path together with ``data_dir``, or ``folder`` without ``data_dir``.
    """
    plain = name.removeprefix("torch/").lower()
    if plain in SPECS:
        if plain == "folder" and data_dir is None:
            raise ConfigError("The data set 'folder' needs --data-dir: a folder with one subfolder a class.")
        return SPECS[plain], None if data_dir is None else Path(data_dir).expanduser()
    if os.sep in name or Path(name).is_dir():
        if data_dir is not None:
            raise ConfigError(
                f"The data set {name!r} is a path already, so --data-dir {data_dir!r} contradicts it. "
                "Give one of them."
            )
        return SPECS["folder"], Path(name).expanduser()
    raise ConfigError(
        f"Unknown data set {name!r}.{nearest(plain, SPECS)} Known: {', '.join(SPECS)}, or the "
        "path of an image folder."
    )
