"""How much of float32 a CUDA device multiplies."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["TENSOR_FLOAT", "cut_short"]

TENSOR_FLOAT = 2.0**-10
"""Products of float32 numbers keep ten bits by TensorFloat-32, which torch allows for convolutions."""


def cut_short(device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether products of numbers of these dtypes may be those of TensorFloat-32."""
    return device.type == "cuda" and torch.float32 in dtypes and _allowed()


def _allowed() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through the interface that does not go with this one
        return True
