"""Data sets: ``load_data`` gives train, validation and test parts, ``Batches`` iterates them.

Texts: ``load_text`` and ``TextBatches``.
"""

from .batches import Batches, make_transform
from .clutter import Clutter, ClutterSplit, compose, compose_splits
from .sources import DEBIAN_FASHION_MNIST, default_data_dir, load_data
from .specs import SPECS, DataSpec, dataset_names, parse_dataset
from .splits import ArraySplit, DataSplits, ImageSplit, Split, hold_out
from .text import TextBatches, TextSplits, load_text
from .text_specs import TEXTS, TextSpec
from .text_vocab import Vocabulary

__all__ = [
    "DEBIAN_FASHION_MNIST",
    "SPECS",
    "TEXTS",
    "ArraySplit",
    "Batches",
    "Clutter",
    "ClutterSplit",
    "DataSpec",
    "DataSplits",
    "ImageSplit",
    "Split",
    "TextBatches",
    "TextSpec",
    "TextSplits",
    "Vocabulary",
    "compose",
    "compose_splits",
    "dataset_names",
    "default_data_dir",
    "hold_out",
    "load_data",
    "load_text",
    "make_transform",
    "parse_dataset",
]
