"""What may stand on a message's way back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the documented common base of BatchNorm layers
from torch.nn.modules.dropout import _DropoutNd

from ..errors import MapError, OptionError

__all__ = ["check_path"]


def check_path(path: nn.Module, state: Tensor, contraction: float | None) -> None:
    """Refuse a module that a message cannot go through.

    Args:
        path: the module.
        state: (B, ...) an example of the span's output.
        contraction: a bound that the message is to keep; None: none.

    Raises:
        OptionError: not a module, one that makes each application another map (batch normalisation, dropout),
            or one beside a bound on the message, which does not know what the module does to distances.
        MapError: it does not map a state to a state of the same shape.
    """
    if not isinstance(path, nn.Module):
        raise OptionError(f"The message's path is a module, such as nn.Tanh(); got a {type(path).__name__}.")
    for part in path.modules():
        if isinstance(part, (_BatchNorm, _DropoutNd)):
            raise OptionError(
                f"A {type(part).__name__} on the message's path makes each step of the iteration another "
                "map. Use a group or layer normalisation, and no dropout."
            )
    if contraction is not None:
        raise OptionError(
            "contraction bounds the message and knows nothing of a module on its path: leave out one of them."
        )
    with torch.no_grad():
        made = path(state)
    if not isinstance(made, Tensor) or made.shape != state.shape:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise MapError(
            f"The message's path must map a state {tuple(state.shape)} to one of the same shape; it returned "
            f"{got}."
        )
