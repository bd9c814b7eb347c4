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

    What modules keep until their mode is set, such as timm's looked-up attention biases, is given up: it is
    that of the weights of now, and the caller may load others.

    Args:
        *modules: with all modules inside of them.
    """
    modes = [(module, module.training) for part in modules for module in part.modules()]
    given = [(part, part.training) for part in modules]
    for part in modules:
        part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in given:
            part.train(mode)  # by the modules' own methods, which a mode that is written does not call
        for module, mode in modes:
            module.training = mode
