"""Weights as they are written and shipped: safetensors with a card beside them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

__all__ = ["save_weights"]


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights; what a wormhole keeps for training alone is left out."""
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in model.state_dict().items()
        if ".feedback." not in key
    }
    save_file(state, path)
