"""Models of mixed difficulty for the tests of streams, and what they give batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.blocks.wormhole import Wormhole

RATES = (0.1, 0.1, 0.2, 0.1, 0.3, 0.1, 0.6, 0.1, 0.1, 0.9)


class Mixed(nn.Module):
    """``z = rate * tanh(z W + x)`` by ``fix``; the last column of the input is the rate of the row."""

    def __init__(self, size: int = 6, seed: int = 0, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        self.weight = nn.Parameter(weight)
        self.options = {"tol": 1e-4, "max_iter": 60, **options}
        self.solutions: list[tw.Solution] = []

    def forward(self, x: Tensor) -> Tensor:
        rate, x = x[:, -1:], x[:, :-1]
        solution = tw.fix(
            lambda z, x, rate: rate * torch.tanh(z @ self.weight + x),
            torch.zeros_like(x),
            x,
            rate,
            **self.options,
        )
        self.solutions.append(solution)
        assert not torch.is_grad_enabled()
        return solution.value.sum(dim=1)


def mixed_batches(rows: int, size: int, width: int = 6, seed: int = 0) -> list[Tensor]:
    """Inputs of :class:`Mixed`, the last batch smaller where ``rows`` is no multiple of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.tensor(RATES)[torch.randint(len(RATES), (rows, 1), generator=generator)]
    x = torch.cat([torch.randn(rows, width, generator=generator), rate], dim=1)
    return list(x.split(size))


class Cell(nn.Module):
    """A body whose rows contract at different rates: the norm of an input says how far it is from rest."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) * x.mean(dim=(1, 2, 3), keepdim=True)


class Two(nn.Module):
    """Two wormhole blocks, one behind the other."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(3)
        example = torch.randn(2, 4, 6, 6)
        options = {"gate": "always", "scale": 0.9, "tol": 1e-4, "max_iter": 25, **settings}
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = Wormhole(Cell(), example, **options)
        self.second = Wormhole([Cell(), nn.Conv2d(4, 4, 1)], example, **options)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))


def images(rows: int, size: int, seed: int = 0, side: int = 6) -> list[Tensor]:
    """Batches of images whose scale differs."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.2 + 3 * torch.rand(rows, 1, 1, 1, generator=generator) ** 3
    x = scale * (0.5 + torch.randn(rows, 3, side, side, generator=generator))
    return list(x.split(size))


FACTS = ("gate", "status", "steps", "fallback")


@torch.no_grad()
def one_by_one(model: nn.Module, batches: list[Tensor]) -> tuple[list[Tensor], list[list[tw.SpanRecord]]]:
    """Outputs and records batch by batch."""
    outputs, records = [], []
    for batch in batches:
        outputs.append(model(batch))
        records.append(list(tw.report(model)))
    return outputs, records


def assert_same(outputs: list[Tensor], expected: list[Tensor], tol: float = 1e-5) -> None:
    """Equal to the rounding of batched kernels."""
    assert len(outputs) == len(expected)
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tol, atol=tol, equal_nan=True)


def assert_same_facts(report: tw.StreamReport, records: list[list[tw.SpanRecord]]) -> None:
    """Who was iterated, for how long and with what success is what it was batch by batch, row by row."""
    assert len(report.spans) == len(records[0])
    for place, span in enumerate(report.spans):
        for fact in FACTS:
            theirs = torch.cat([getattr(batch[place], fact) for batch in records])
            assert torch.equal(getattr(span, fact), theirs), (span.span, fact)
