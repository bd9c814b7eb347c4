"""The fixed-point-iterative (FPI) block: a self-loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from .settings import check_names
from .wormhole import Wormhole, block_options

__all__ = ["FPI"]


def FPI(body: nn.Module | Sequence[nn.Module], example: Tensor, **options: Any) -> Wormhole:
    """Fixed-point-iterative layer of Mathur & Plis (2023): a layer iterated until it settles.

    ``z <- body(x + message(z))``: the self-loop wormhole of one layer with its gate always open.

    Args:
        body: the layer.
        example: an input of it, to learn the shapes from.
        **options: those of :class:`~twnn_plugin.blocks.wormhole.Wormhole`, but for the gate.

    Raises:
        MapError: the body does not map a tensor to a tensor of the same batch size.
        OptionError: an unknown or impossible option.
    """
    if "gate" in options:
        raise OptionError(
            "The gate of an FPI layer is always open: leave gate out, or take tw.blocks.get('wormhole')."
        )
    check_names("An FPI layer", options, block_options("gate"))
    return Wormhole(body, example, gate="always", **options)
