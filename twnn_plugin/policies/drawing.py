"""Layers drawn by weights: what the policies share that iterate one at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from .numbers import is_number
from .selection import SelectionView

__all__ = ["check_weights", "drawn_layers"]


def check_weights(
    policy: str, weights: Sequence[float] | None, layers: Sequence[str] | None = None
) -> tuple[float, ...] | None:
    """How often each layer is drawn, as floats; None stays None.

    Args:
        policy: whose option ``weights`` it is.
        weights: as the user gave them.
        layers: names of the layers, where they are known.

    Raises:
        OptionError: a negative one or one that is not finite, none above 0, or not one for each layer.
    """
    if weights is None:
        return None
    numbers = isinstance(weights, Sequence) and all(is_number(w) for w in weights)
    if not numbers or min(weights, default=0) < 0 or not sum(weights) > 0:
        raise OptionError(
            f"Option weights of policy {policy!r} must be finite numbers >= 0 that sum to more than 0, "
            f"one for each layer; got {weights!r}."
        )
    if layers is not None and len(weights) != len(layers):
        raise OptionError(
            f"Option weights of policy {policy!r} needs one number for each of the {len(layers)} layers "
            f"{', '.join(layers)}; got {len(weights)}."
        )
    return tuple(float(w) for w in weights)


def drawn_layers(view: SelectionView, weights: Sequence[float] | None) -> Tensor:
    """(b,) the place of a layer for each sample, drawn from torch's global generator."""
    if not view.rows:
        return view.last
    share = torch.ones(len(view.layers), device=view.last.device)
    if weights is not None:
        share = torch.tensor(weights, dtype=share.dtype, device=share.device)
    return torch.multinomial(share, view.rows, replacement=True)
