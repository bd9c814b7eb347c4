"""Telling whether random numbers were drawn, and drawing the same ones again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_state", "restore", "same"]


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that modules on ``device`` draw from."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def restore(device: torch.device, state: tuple[Tensor, ...]) -> None:
    """Go back to a state that :func:`random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether no number was drawn between the two states."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
