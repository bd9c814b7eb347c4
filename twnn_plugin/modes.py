"""Modules in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; every module's own mode is restored afterwards.

    Args:
        *modules: with all modules inside of them.
    """
    modes = [(module, module.training) for part in modules for module in part.modules()]
    for part in modules:
        part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
