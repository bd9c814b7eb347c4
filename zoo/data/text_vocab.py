"""From text to numbers: tokens by word or by character, and a vocabulary built on the training part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twnn_plugin.errors import nearest

from ..errors import ConfigError, DataError

__all__ = ["END", "LEVELS", "PAD", "UNKNOWN", "Vocabulary", "tokenize"]

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
"""The tokens that every vocabulary begins with: padding, whatever it does not know, the end of a line."""

LEVELS = ("word", "char")
_WORDS = re.compile("<unk>|\\w+(?:['\u2019]\\w+)*|[^\\w\\s]")


def tokenize(text: str, level: str = "word", spaced: bool = False) -> list[str]:
    """The tokens of a text.

    Args:
        text: anything.
        level: ``"word"``: words in lower case, and each mark of punctuation by itself; ``"char"``:
            characters.
        spaced: words are separated by spaces already, marks included, and keep their case (WikiText).

    Raises:
        ConfigError: an unknown level.
    """
    if level not in LEVELS:
        raise ConfigError(
            f"Unknown level of tokens {level!r}.{nearest(str(level), LEVELS)} Levels: {', '.join(LEVELS)}."
        )
    if level == "char":
        return list(text)
    return text.split() if spaced else _WORDS.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their numbers; number 0 is padding, 1 the unknown token, 2 the end of a line.

    Attributes:
        tokens: in the order of their numbers.
        level: ``"word"`` or ``"char"``.
    """

    tokens: tuple[str, ...]
    level: str = "word"
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokens[:3] != (PAD, UNKNOWN, END) or len(set(self.tokens)) != len(self.tokens):
            raise ConfigError(f"A vocabulary begins with {PAD}, {UNKNOWN}, {END} and names each token once.")
        object.__setattr__(self, "index", {token: number for number, token in enumerate(self.tokens)})

    @classmethod
    def build(cls, tokens: Iterable[str], size: int | None = None, level: str = "word") -> Vocabulary:
        """The most frequent of ``tokens``, ties in alphabetical order.

        Args:
            tokens: of the training part, and of no other.
            size: numbers in all, the three reserved ones included; None: every token gets one.
            level: what the tokens are.

        Raises:
            ConfigError: a size that leaves room for no token.
            DataError: there is no token.
        """
        if size is not None and size < 4:
            raise ConfigError(f"A vocabulary needs at least 4 entries, 3 of them reserved; got {size!r}.")
        counts = Counter(tokens)
        for reserved in (PAD, UNKNOWN, END):
            counts.pop(reserved, None)
        if not counts:
            raise DataError("The text is empty: there is no token to build a vocabulary from.")
        ranked = sorted(counts, key=lambda token: (-counts[token], token))
        kept = ranked if size is None else ranked[: size - 3]
        return cls((PAD, UNKNOWN, END, *kept), level)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Sequence[str], strict: bool = False) -> Tensor:
        """(n,) int64 numbers of ``tokens``.

        Args:
            tokens: any.
            strict: refuse what the vocabulary does not know, instead of taking it for ``<unk>``.

        Raises:
            DataError: with ``strict``, a token outside the vocabulary.
        """
        unknown = self.index[UNKNOWN]
        if strict:
            for place, token in enumerate(tokens):
                if token not in self.index:
                    near = nearest(token, self.tokens)
                    raise DataError(
                        f"The token {token!r} (number {place + 1} of the text) is outside the vocabulary of "
                        f"{len(self)} {self.level}s.{near} Without strict it is read as {UNKNOWN}."
                    )
        return torch.tensor([self.index.get(token, unknown) for token in tokens], dtype=torch.int64)

    def decode(self, numbers: Tensor | Sequence[int]) -> list[str]:
        """The tokens of (n,) numbers.

        Raises:
            DataError: a number outside the vocabulary.
        """
        found = [int(number) for number in numbers]
        for number in found:
            if not 0 <= number < len(self):
                raise DataError(f"Number {number} is outside the vocabulary of {len(self)} {self.level}s.")
        return [self.tokens[number] for number in found]
