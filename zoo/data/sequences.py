"""Sequence tasks: generated ones with exact labels, images read as sequences, and a sine wave.

Everything is a function of its arguments: a part of a set (``"train"``, ``"val"``, ``"test"``) has a
random stream of its own, so that parts of one seed are independent, and one seed gives one set.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from twnn_plugin.errors import nearest

from ..errors import ConfigError

__all__ = ["BLANK", "GO", "WaveData", "adding", "as_sequences", "copy_memory", "sine_wave", "stream"]

PARTS = ("train", "val", "test")
SYMBOLS = 8
BLANK, GO = 0, SYMBOLS + 1
"""Tokens of copy memory: 0 is a blank, 1 to 8 are symbols, 9 asks for them."""


def stream(name: str, part: str, seed: int) -> torch.Generator:
    """The random stream of one part of one set.

    Raises:
        ConfigError: an unknown part or a negative seed.
    """
    if part not in PARTS:
        raise ConfigError(f"Unknown part {part!r}.{nearest(str(part), PARTS)} Parts: {', '.join(PARTS)}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed must be a whole number >= 0; got {seed!r}.")
    digest = hashlib.sha256(f"{name}/{part}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def adding(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem (Hochreiter & Schmidhuber 1997, as in Le, Jaitly & Hinton 2015).

    Each step has a number in [0, 1) and a mark; one step of the first half and one of the second half
    are marked, and the answer is the sum of their numbers. Always answering 1 has a mean squared error
    of 1/6.

    Args:
        count: sequences.
        length: steps, at least 2.
        generator: source of randomness, see :func:`stream`.

    Returns:
        (count, length, 2) numbers and marks, and (count,) sums.
    """
    _positive(count=count)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ConfigError(f"The adding problem needs a length of at least 2 steps; got {length!r}.")
    numbers = torch.rand(count, length, generator=generator)
    half = length // 2
    first = torch.randint(0, half, (count,), generator=generator)
    second = torch.randint(half, length, (count,), generator=generator)
    marks = torch.zeros(count, length)
    rows = torch.arange(count)
    marks[rows, first] = 1
    marks[rows, second] = 1
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(dim=1)


def copy_memory(count: int, delay: int, generator: torch.Generator, width: int = 10) -> tuple[Tensor, Tensor]:
    """Copy memory (Hochreiter & Schmidhuber 1997, as in Arjovsky, Shah & Bengio 2016).

    ``width`` symbols of eight, ``delay - 1`` blanks, one token that asks, ``width`` blanks during
    which the symbols are to be repeated: ``delay + 2 width`` steps. Without memory the mean cross-entropy
    is ``width ln(8) / (delay + 2 width)`` at best.

    Args:
        count: sequences.
        delay: steps between the last symbol and the first that is to be repeated, at least 1.
        generator: source of randomness, see :func:`stream`.
        width: symbols to remember.

    Returns:
        Tokens in, and tokens wanted (blank outside the answer), both (count, delay + 2 width) int64.
    """
    _positive(count=count, delay=delay, width=width)
    symbols = torch.randint(1, SYMBOLS + 1, (count, width), generator=generator)
    tokens = torch.full((count, delay + 2 * width), BLANK)
    tokens[:, :width] = symbols
    tokens[:, width + delay - 1] = GO
    wanted = torch.full_like(tokens, BLANK)
    wanted[:, -width:] = symbols
    return tokens, wanted


def as_sequences(images: Tensor, by: str = "pixels") -> Tensor:
    """Images read from the top left to the bottom right.

    Args:
        images: (N, C, H, W).
        by: ``"pixels"``: a step is a pixel's C values; ``"rows"``: a step is a row's C W values.

    Returns:
        (N, H W, C) or (N, H, W C).
    """
    if images.dim() != 4:
        raise ConfigError(f"Images are (N, C, H, W); got shape {tuple(images.shape)}.")
    if by == "pixels":
        return images.flatten(2).transpose(1, 2)
    if by == "rows":
        return images.permute(0, 2, 3, 1).flatten(2)
    raise ConfigError(f"by must be 'pixels' or 'rows'; got {by!r}.{nearest(str(by), ('pixels', 'rows'))}")


class WaveData(NamedTuple):
    """A wave: times (N, 1) in [-1, 1] and values (N, 1) in (0, 1), which a sigmoid can reach."""

    times: Tensor
    values: Tensor


def sine_wave(length: int = 10_000, periods: float = 2.0, margin: float = 0.05) -> WaveData:
    """A sampled sine wave, scaled into [margin, 1 - margin].

    Args:
        length: samples.
        periods: in all.
        margin: how far the wave stays from 0 and 1, in [0, 0.5).
    """
    _positive(length=length)
    if not 0 <= margin < 0.5:
        raise ConfigError(f"margin must be in [0, 0.5); got {margin!r}.")
    times = torch.linspace(-1, 1, length)[:, None]
    values = 0.5 + (0.5 - margin) * torch.sin(math.pi * periods * (times + 1))
    return WaveData(times, values)


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1; got {value!r}.")
