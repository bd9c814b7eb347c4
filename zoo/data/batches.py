"""Batches whose content is a function of (seed, epoch, step) and nothing else.

timm's ``create_loader`` draws order and augmentation from global random state, which differs between
a run and the same run resumed in mid-epoch. Here every order comes from ``(seed, epoch)`` and every
augmented sample from ``(seed, epoch, index)``, whatever the number of workers; the transforms
themselves are timm's.
"""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import DataError
from .specs import DataSpec
from .splits import ArraySplit, Split

__all__ = ["Batches", "make_transform"]

Transform = Callable[[Any], Tensor]


class Batches:
    """Iterable over the batches of a split, on the CPU.

    Each batch is a pair: images (B, C, H, W) float32, normalised, and labels (B,) int64. Iterating
    gives epoch 0; :meth:`epoch` gives any epoch from any batch on.

    Args:
        split: where the rows come from.
        spec: size and normalisation.
        batch_size: rows a batch and rank.
        transform: PIL image to (C, H, W) tensor; ``None`` for the plain, normalised image.
        shuffle: new order every epoch.
        drop_last: leave out the last incomplete batch, unless it is the only one.
        seed: of order and augmentation.
        workers: processes that decode and transform.
        rank: this process among ``world_size``; each gets its own rows.
        world_size: number of processes.
        pinned: put batches into memory that a CUDA device copies from while the host goes on.
    """

    def __init__(
        self,
        split: Split,
        spec: DataSpec,
        batch_size: int,
        *,
        transform: Transform | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pinned: bool = False,
    ):
        self.split = split
        self.spec = spec
        self.batch_size = batch_size
        self.transform = transform
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.pinned = pinned

    def __len__(self) -> int:
        return len(self.order(0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def order(self, epoch: int) -> list[Tensor]:
        """The row indices of every batch of ``epoch`` for this rank."""
        rows = len(self.split)
        indices = torch.arange(rows)
        if self.shuffle:
            indices = torch.randperm(rows, generator=torch.Generator().manual_seed(_mix(self.seed, epoch)))
        chunk = self.batch_size * self.world_size
        if self.drop_last and rows > chunk:
            indices = indices[: rows - rows % chunk]
        mine = indices[self.rank :: self.world_size]
        return list(mine.split(self.batch_size)) if len(mine) else []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``epoch`` from number ``start`` on; the skipped ones are never loaded.

        Raises:
            DataError: on the way, at an image that cannot be read.
        """
        batches = self.order(epoch)[start:]
        if isinstance(self.split, ArraySplit) and self.transform is None:
            return (self._gather(self.split, rows) for rows in batches)
        transform = self.transform or make_transform(self.spec)
        rows = _Rows(self.split, transform, self.seed, epoch)
        # A generator of its own: the loader would take its base seed from the global one, and a
        # resumed epoch would then see other random numbers than an uninterrupted one.
        loader = DataLoader(
            rows,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            generator=torch.Generator(),
            collate_fn=_collate,
            pin_memory=self.pinned,
        )
        return _unpacked(iter(loader))

    def _gather(self, split: ArraySplit, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = split.images[rows].float().div_(255)
        size = (self.spec.img_size, self.spec.img_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        mean = torch.tensor(self.spec.mean).view(-1, 1, 1)
        std = torch.tensor(self.spec.std).view(-1, 1, 1)
        images, labels = (images - mean) / std, split.labels[rows]
        return (images.pin_memory(), labels.pin_memory()) if self.pinned else (images, labels)


def make_transform(spec: DataSpec, **augment: Any) -> Transform:
    """The transform of timm for ``spec``: the evaluation one, or with ``augment`` the training one.

    Args:
        spec: size and normalisation.
        **augment: keywords of :func:`timm.data.create_transform`, such as ``hflip`` or ``auto_augment``.
    """
    from timm.data import create_transform

    made: Any = create_transform(
        spec.input_size,
        is_training=bool(augment),
        mean=spec.mean,
        std=spec.std,
        interpolation="bilinear",
        **(augment or {"crop_pct": 0.875 if spec.name == "folder" else 1.0}),
    )
    return made


def _collate(rows: list[Any]) -> Any:
    """A batch of rows, or the first error among them."""
    return next((row for row in rows if isinstance(row, DataError)), None) or default_collate(rows)


def _unpacked(batches: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, up to one that is an error, which is raised here."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        images, labels = batch
        yield images, labels


class _Rows(Dataset[Any]):
    """Transformed rows; each draws its random numbers from (seed, epoch, index).

    An image that cannot be read gives its error as the row: raised in a worker process, it would arrive
    with that worker's traceback in the place of its one line.
    """

    def __init__(self, split: Split, transform: Transform, seed: int, epoch: int):
        self.split = split
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        with _seeded(_mix(self.seed, self.epoch, index)):
            try:
                image = self.split.pil(index)
            except DataError as error:
                return error
            return self.transform(image), int(self.split.labels[index])


def _mix(*numbers: int) -> int:
    """One 32-bit seed from several numbers; (1, 2) and (2, 1) give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (CPU) inside, and leave the global state as it was found."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
