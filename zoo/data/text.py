"""Texts as data sets: language models read a stream in windows, classifiers read documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .sources import default_data_dir
from .splits import hold_out
from .text_corpora import Documents, Verse, bible, imdb, lines_of_parts, small_bible
from .text_specs import TextSpec, text_name
from .text_vocab import END, Vocabulary, tokenize

__all__ = ["DocumentSplit", "StreamSplit", "TextBatches", "TextSplit", "TextSplits", "load_text"]

HELD_OUT = 0.1
SPLIT_SEED = 0  # not the seed of a run: runs with other seeds must share one test part


@dataclass(frozen=True)
class StreamSplit:
    """A text as one stream of tokens, read in windows that follow each other without overlap.

    A window's targets are its tokens moved on by one. What is left of the stream after the last whole window
    is not read.

    Attributes:
        tokens: (n,) int64.
        length: tokens of a window.
    """

    tokens: Tensor
    length: int

    def __len__(self) -> int:
        return max(0, (self.tokens.numel() - 1) // self.length)

    def rows(self, index: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Windows ``index`` (b,), all moved on by ``offset`` tokens: inputs and targets, (b, length) each."""
        start = index[:, None] * self.length + offset
        place = start + torch.arange(self.length)
        return self.tokens[place], self.tokens[place + 1]

    def movable(self) -> int:
        """By how many tokens the windows can be moved without one falling off the end."""
        return min(self.length, self.tokens.numel() - len(self) * self.length)


@dataclass(frozen=True)
class DocumentSplit:
    """Texts of one length: longer ones are cut, shorter ones are followed by padding (number 0).

    Attributes:
        tokens: (n, length) int64.
        labels: (n,) int64.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def rows(self, index: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Documents ``index`` (b,) and their labels; documents are not moved."""
        return self.tokens[index], self.labels[index]

    def movable(self) -> int:
        """By one place: not at all."""
        return 1


TextSplit = StreamSplit | DocumentSplit


@dataclass(frozen=True)
class TextSplits:
    """A text, cut. Choices are made on ``val``; ``test`` is for the figure that is reported.

    Attributes:
        spec: with the number of classes and of tokens filled in.
        vocabulary: built on ``train``.
    """

    spec: TextSpec
    vocabulary: Vocabulary
    train: TextSplit
    val: TextSplit
    test: TextSplit

    def part(self, name: str) -> TextSplit:
        """``"train"``, ``"val"`` or ``"test"``."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


class TextBatches:
    """Iterable over the batches of a text, which are a function of (seed, epoch, step) and nothing else.

    Each batch is a pair: tokens (B, T) int64, and targets (B, T) or labels (B,), int64. With ``shuffle`` the
    windows of a stream come in another order every epoch, and begin at another place.

    Args:
        split: where the rows come from.
        batch_size: rows a batch and rank.
        shuffle: new order every epoch.
        drop_last: leave out the last incomplete batch, unless it is the only one.
        seed: of the order.
        rank: this process among ``world_size``; each gets its own rows.
        world_size: number of processes.
    """

    def __init__(
        self,
        split: TextSplit,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.split, self.batch_size, self.shuffle, self.drop_last = split, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        return len(self.order(0)[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def order(self, epoch: int) -> tuple[list[Tensor], int]:
        """The rows of every batch of ``epoch`` for this rank, and by how many tokens windows are moved."""
        rows, offset = len(self.split), 0
        index = torch.arange(rows)
        if self.shuffle:
            seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(seed)
            index = torch.randperm(rows, generator=generator)
            offset = int(torch.randint(self.split.movable(), (), generator=generator))
        chunk = self.batch_size * self.world_size
        if self.drop_last and rows > chunk:
            index = index[: rows - rows % chunk]
        mine = index[self.rank :: self.world_size]
        return (list(mine.split(self.batch_size)) if len(mine) else []), offset

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``epoch`` from number ``start`` on."""
        batches, offset = self.order(epoch)
        return (self.split.rows(rows, offset) for rows in batches[start:])


def load_text(
    dataset: str = "kjv-small",
    data_dir: str | None = None,
    download: bool = False,
    *,
    level: str = "word",
    vocab_size: int | None = None,
    length: int | None = None,
) -> TextSplits:
    """Load a text and cut it into train, validation and test.

    The vocabulary is built on the training part. Biblical texts are cut by chapters, a tenth of each
    book's for validation and a tenth for the test, so that no part holds the neighbours of another's verses;
    sets that bring their own parts keep them.

    Args:
        dataset: a name of :data:`~zoo.data.text_specs.TEXTS`.
        data_dir: where to look; by default :func:`~zoo.data.default_data_dir` and, for the Bible, Debian's
            package.
        download: fetch WikiText-2 and IMDB with the ``datasets`` library where they are missing.
        level: tokens by ``"word"`` or by ``"char"``.
        vocab_size: the most frequent tokens, three reserved ones included; None: the set's own.
        length: tokens of a window or of a document; None: the set's own.

    Raises:
        ConfigError: unknown name, or an impossible size.
        DataError: the text is not there, not complete, empty, or shorter than a window.
    """
    spec = text_name(dataset)
    if length is not None and length < 1:
        raise ConfigError(f"A window or document has at least 1 token; got length={length!r}.")
    length = spec.length if length is None else length
    root = None if data_dir is None else Path(data_dir).expanduser()
    spaced = spec.name == "wikitext-2"
    size = vocab_size if vocab_size is not None or level == "char" else spec.vocab_size
    if spec.name == "imdb":
        parts = _three(*imdb(root or default_data_dir(), download))
    elif spec.name in ("wikitext-2", "text"):
        parts = [_lines(p) for p in lines_of_parts(spec.name, root or default_data_dir(), download)]
    else:
        verses = small_bible() if spec.name.startswith("kjv-small") else bible(root)
        parts = [_documents(part, spec) for part in _by_chapter(verses)]
    return _encoded(spec, parts, lambda text: tokenize(text, level, spaced), level, size, length)


def _encoded(
    spec: TextSpec,
    parts: Sequence[Documents],
    tokens_of: Callable[[str], list[str]],
    level: str,
    size: int | None,
    length: int,
) -> TextSplits:
    tokens = [[tokens_of(text) for text in part.texts] for part in parts]
    vocabulary = Vocabulary.build((t for line in tokens[0] for t in line), size, level)
    made: list[TextSplit] = []
    for part, lines, name in zip(parts, tokens, ("training", "validation", "test"), strict=True):
        if spec.task == "language":
            stream = vocabulary.encode([t for line in lines for t in (*line, END)])
            split: TextSplit = StreamSplit(stream, length)
        else:
            split = _padded(vocabulary, lines, part.labels, length)
        if not len(split):
            raise DataError(
                f"The {name} part of {spec.name!r} is empty or shorter than a window of {length} tokens: it "
                f"has {sum(map(len, lines)):,}. Take a smaller length (--text-length)."
            )
        made.append(split)
    classes = len(vocabulary) if spec.task == "language" else 1 + max(max(p.labels) for p in parts)
    spec = replace(spec, num_classes=classes, vocab_size=len(vocabulary), length=length)
    return TextSplits(spec, vocabulary, *made)


def _padded(
    vocabulary: Vocabulary, lines: Sequence[list[str]], labels: Sequence[int], length: int
) -> DocumentSplit:
    tokens = torch.zeros(len(lines), length, dtype=torch.int64)
    for row, line in enumerate(lines):
        found = vocabulary.encode(line[:length])
        tokens[row, : found.numel()] = found
    return DocumentSplit(tokens, torch.tensor(list(labels), dtype=torch.int64))


def _lines(lines: Sequence[str]) -> Documents:
    kept = [line for line in lines if line.strip()]
    return Documents(kept, [0] * len(kept))


def _three(train: Documents, test: Documents) -> list[Documents]:
    """Training texts cut in training and validation, and the test part as it is."""
    kept, held = hold_out(torch.tensor(list(train.labels)), HELD_OUT, SPLIT_SEED + 1)
    cut = [
        Documents([train.texts[int(i)] for i in rows], [train.labels[int(i)] for i in rows])
        for rows in (kept, held)
    ]
    return [*cut, test]


def _by_chapter(verses: Sequence[Verse]) -> tuple[list[Verse], list[Verse], list[Verse]]:
    """Verses of training, validation and test; a book of one or two chapters is all for training."""
    chapters: dict[str, list[int]] = {}
    for verse in verses:
        known = chapters.setdefault(verse.book, [])
        if verse.chapter not in known:
            known.append(verse.chapter)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    where: dict[tuple[str, int], int] = {}
    for book, numbers in chapters.items():
        count = max(1, round(len(numbers) * HELD_OUT)) if len(numbers) > 2 else 0
        order = torch.randperm(len(numbers), generator=generator).tolist()
        for place, chosen in enumerate(order):
            where[book, numbers[chosen]] = 1 if place < count else 2 if place < 2 * count else 0
    parts: tuple[list[Verse], list[Verse], list[Verse]] = ([], [], [])
    for verse in verses:
        parts[where[verse.book, verse.chapter]].append(verse)
    return parts


def _documents(verses: Sequence[Verse], spec: TextSpec) -> Documents:
    """Verses as texts, labelled by what ``spec`` asks for."""
    return Documents([v.text for v in verses], [spec.label(v.book) for v in verses])
