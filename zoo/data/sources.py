"""Where each data set comes from: scikit-learn, idx files, torchvision through timm, image folders."""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .clutter import RECIPES, compose_splits
from .idx import has_idx_files, read_idx_pair
from .specs import SPECS, DataSpec, parse_dataset
from .splits import ArraySplit, DataSplits, ImageSplit, Split, hold_out

__all__ = ["DEBIAN_FASHION_MNIST", "default_data_dir", "load_data"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs its four files."""

VAL_FRACTION, TEST_FRACTION = 0.1, 0.2
SPLIT_SEED = 0  # not the seed of a run: runs with other seeds must share one validation set
_IDX_SETS = ("mnist", "fashion_mnist")
# What torchvision's readers raise on bytes that are not what they expect; it checks with assert.
_DAMAGED = (
    *(AssertionError, ValueError, LookupError, TypeError, EOFError, zlib.error, pickle.UnpicklingError),
)


def default_data_dir() -> Path:
    """``$TWNN_DATA_DIR``, else ``twnn`` in the user's cache folder."""
    chosen = os.environ.get("TWNN_DATA_DIR")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "twnn"


def load_data(
    dataset: str = "digits",
    data_dir: str | None = None,
    download: bool = False,
    img_size: int | None = None,
) -> DataSplits:
    """Load a data set and cut it into train, validation and test.

    The validation part is held out from the training set, stratified, with a fixed seed; a set that
    brings its own test part keeps it untouched.

    Args:
        dataset: a name of :func:`~zoo.data.dataset_names`, or the path of an image folder.
        data_dir: where to look; by default :func:`default_data_dir` and, for Fashion-MNIST, Debian's
            package.
        download: fetch a set of torchvision that is not there.
        img_size: deliver images at this height and width instead of the set's own.

    Raises:
        ConfigError: unknown name.
        DataError: the set is not there, not complete, not readable, has labels that it cannot have, or too
            few images to be cut.
    """
    spec, root = parse_dataset(dataset, data_dir)
    spec = spec.resized(img_size)
    if spec.name == "digits":
        return _cut(spec, _digits(), None)
    if spec.name in RECIPES:  # composed anew, of parts that share no scan
        return compose_splits(spec, _cut(SPECS["digits"], _digits(), None), RECIPES[spec.name])
    if spec.name == "folder":
        assert root is not None
        return _folder(spec, root)
    folder = _flat_idx_folder(spec.name, root)
    if folder is not None:
        train, test = (_grey(*read_idx_pair(folder, split)) for split in ("train", "test"))
    else:
        train, test = (_torchvision(spec.name, root, split, download) for split in ("train", "test"))
    return _cut(spec, train, test)


def _cut(spec: DataSpec, train: Split, test: Split | None) -> DataSplits:
    """Hold a validation part out of ``train``, and a test part too if the set has none."""
    for part, split in (("training", train), ("test", test)):
        if split is not None:
            _check_labels(spec, part, split)
    try:
        if test is None:
            kept, held = hold_out(train.labels, TEST_FRACTION, SPLIT_SEED)
            train, test = train.subset(kept), train.subset(held)
        kept, held = hold_out(train.labels, VAL_FRACTION, SPLIT_SEED + 1)
    except DataError as error:
        more = " Add images, or give the folders train, val and test." if spec.name == "folder" else ""
        raise DataError(
            f"The data set {spec.name!r} cannot be cut into training, validation and test images: "
            f"{error}{more}"
        ) from None
    return DataSplits(spec, train.subset(kept), train.subset(held), test)


def _check_labels(spec: DataSpec, part: str, split: Split) -> None:
    """Refuse a part without images, or with a label that no output of a model stands for."""
    if not len(split):
        raise DataError(
            f"The {part} part of {spec.name!r} is empty. Fetch its files again, or give another --data-dir."
        )
    least, most = int(split.labels.min()), int(split.labels.max())
    if least < 0 or most >= spec.num_classes:
        raise DataError(
            f"The {part} labels of {spec.name!r} go from {least} to {most}, and it has {spec.num_classes} "
            f"classes, 0 to {spec.num_classes - 1}: the files are of another set. Give another --data-dir."
        )


def _digits() -> ArraySplit:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # the scans count 0..16
    return _grey(pixels, bunch.target)


def _grey(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
    """(N, H, W) uint8 and (N,) labels as a split with one channel."""
    return ArraySplit(torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64)))


def _flat_idx_folder(name: str, root: Path | None) -> Path | None:
    """The first place where the set's four idx files lie flat; an explicit ``root`` is the only place."""
    if name not in _IDX_SETS:
        return None
    named = (name, name.replace("_", "-"))
    if root is not None:
        places = [root, *(root / sub for sub in named)]
    else:
        places = [default_data_dir() / sub for sub in named]
        if name == "fashion_mnist":
            places.append(DEBIAN_FASHION_MNIST)
    return next((place for place in places if has_idx_files(place)), None)


def _torchvision(name: str, root: Path | None, split: str, download: bool) -> ArraySplit:
    """A set of torchvision through timm's factory, as tensors."""
    from timm.data import create_dataset

    place = root or default_data_dir()
    try:
        if download:
            place.mkdir(parents=True, exist_ok=True)
        data: Any = create_dataset(
            f"torch/{name}",
            root=str(place),
            split="train" if split == "train" else "validation",
            download=download,
        )
    except (OSError, RuntimeError) as error:
        raise DataError(_missing(name, root, place, download, error)) from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"The files of {name!r} in {place} are damaged ({reason[:160]}). Delete them and pass "
            "--dataset-download to fetch them again, or give another --data-dir."
        ) from None
    images = torch.as_tensor(data.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ArraySplit(images, torch.as_tensor(data.targets, dtype=torch.int64))


def _missing(name: str, root: Path | None, place: Path, download: bool, error: Exception) -> str:
    """One line: what is missing, where it was looked for, how to get it."""
    looked = [str(place)]
    if root is None and name == "fashion_mnist":
        looked.append(str(DEBIAN_FASHION_MNIST))
    where = " and ".join(looked)
    if download:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"The data set {name!r} is not in {where} and its download failed ({reason}). "
            "Put the files there by hand, or give their folder with --data-dir."
        )
    package = ", or install Debian's package dataset-fashion-mnist" if name == "fashion_mnist" else ""
    return (
        f"The data set {name!r} is not (or not completely) in {where}. Pass --dataset-download to fetch it, "
        f"or --data-dir with the folder that holds it{package}."
    )


def _folder(spec: DataSpec, root: Path) -> DataSplits:
    """An image folder, with subfolders for its parts or without.

    ``val`` and ``test`` are both taken where both exist. A single one is the test part, and validation
    is held out from the training images; with neither, both are held out.
    """
    if not root.is_dir():
        raise DataError(f"There is no image folder {root}. Give one with a subfolder for each class.")
    train_dir = _subfolder(root, ("train", "training"))
    val_dir = _subfolder(root, ("val", "valid", "validation")) if train_dir else None
    test_dir = _subfolder(root, ("test", "testing")) if train_dir else None
    train, classes = _images(train_dir or root, None)
    spec = replace(spec, num_classes=len(classes))
    if val_dir and test_dir:
        return DataSplits(spec, train, _images(val_dir, classes)[0], _images(test_dir, classes)[0])
    held = val_dir or test_dir
    return _cut(spec, train, _images(held, classes)[0] if held else None)


def _subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _images(folder: Path, classes: dict[str, int] | None) -> tuple[ImageSplit, dict[str, int]]:
    """The folder reader of timm over ``folder``; ``classes`` fixes the label of each subfolder's name."""
    from timm.data import create_dataset

    try:
        # Without a class map: given one, the reader leaves out the images of all other classes silently.
        data: Any = create_dataset("", root=str(folder), search_split=False)
    except (RuntimeError, OSError) as error:
        raise DataError(f"Cannot use {folder} as an image folder: {error}") from None
    found: dict[str, int] = data.reader.class_to_idx
    if "" in found:
        raise DataError(
            f"There are images in {folder} itself, outside the subfolder of any class. Move them into one."
        )
    _check_folders(folder, [data.reader.filename(i) for i in range(len(data.reader))])
    known = _numbered(found) if classes is None else classes
    unknown = [name for name in found if name not in known]
    if unknown:
        raise DataError(
            f"The image folder {folder} has classes that the training images do not have: "
            f"{_few(unknown)}. Known: {_few(list(known))}. Rename or remove them, or add training images."
        )
    number = {label: known[name] for name, label in found.items()}
    labels: Tensor = torch.tensor([number[label] for _, label in data.reader.samples], dtype=torch.int64)
    return ImageSplit(_Decode(data.reader), torch.arange(len(labels)), labels), known


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Numbers of classes in timm's order, the same in every process.

    Names that timm takes for equal, such as ``a`` and ``A`` or ``1`` and ``01``, come in any order from it: a
    checkpoint would be tested, or a run gone on with, under other labels than it was trained on.
    """
    from timm.utils import natural_key

    ordered = sorted(names, key=lambda name: (natural_key(name), name))
    return {name: number for number, name in enumerate(ordered)}


def _check_folders(folder: Path, files: Sequence[str]) -> None:
    """Refuse folders of one name in several places: the reader would take all of them for one class.

    So the classes of ``Train`` and ``Test``, or of ``cats/2023`` and ``dogs/2023``, would be mixed silently.
    """
    places: dict[str, str] = {}
    for place in dict.fromkeys(os.path.dirname(file) for file in files):
        name = os.path.basename(place)
        if places.setdefault(name, place) != place:
            raise DataError(
                f"The image folder {folder} has {places[name]!r} and {place!r}, and a class is told by the "
                "name of the folder that its images are in: they would be one class. Give each class one "
                "folder; parts are told by the names train, val and test."
            )


def _few(names: list[str], most: int = 10) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Decode:
    """Index to RGB image; a class, since loader workers must be able to pickle it.

    timm's own data set puts the next image in the place of one that it cannot read, which would then carry
    the label of the damaged one.
    """

    def __init__(self, reader: Any):
        self.reader = reader

    def __call__(self, index: int) -> Any:
        from PIL import Image

        try:
            file, _ = self.reader[index]
            with file, Image.open(file) as image:
                return image.convert("RGB")
        except Exception as error:  # each of Pillow's decoders has its own: no common base
            path = self.reader.filename(index, absolute=True)
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise DataError(
                f"The image {path} cannot be read ({reason}). Replace it, or remove it from the data set."
            ) from None
