"""Modules for a message's way back, as users give them: a name, a function, a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from . import registry
from .message import LAYOUTS, layout_of

__all__ = ["MessagePath", "path_of"]

MessagePath = str | tuple[str, dict[str, Any]] | nn.Module | Callable[[int], nn.Module]
"""A registered block that takes ``features``, such as ``"verlet"`` or ``("verlet", {"layers": 8})``; a
module; or a function that makes one for a number of channels."""


def path_of(message: MessagePath | None, out: Tensor, channels_last: bool) -> nn.Module | None:
    """The module that a message goes through first, or None.

    A block given by name is made for the state's channels. Where these are the second of four axes, so that a
    dense layer would act along the columns of the grid, it gets ``kernel_size=1`` unless ``kernel_size`` is
    given: the same layer at each position.

    Args:
        message: see :data:`MessagePath`; None: none.
        out: (B, ...) an example of the state.
        channels_last: whether 4-axis activations are (B, H, W, C).

    Raises:
        UnknownNameError: no such block.
        OptionError: a block that is not made for a number of features, an unknown option, or something else.
    """
    if message is None or isinstance(message, nn.Module):
        return message
    layout = layout_of(out, channels_last)
    channels = out.shape[LAYOUTS[layout]]
    if callable(message):
        made = message(channels)
        if not isinstance(made, nn.Module):
            raise OptionError(
                f"message, as a function of the state's {channels} channels, must return a module; it "
                f"returned a {type(made).__name__}."
            )
        return made
    name, options = (message, {}) if isinstance(message, str) else _named(message)
    known = inspect.signature(registry.get(name)).parameters
    if "features" not in known:
        fitting = [
            e.name for e in registry.entries() if "features" in inspect.signature(e.factory).parameters
        ]
        raise OptionError(
            f"Block {name!r} takes no number of features, and so is no way back for a message. Those that "
            f"do: {', '.join(fitting)}. Or give a module."
        )
    if layout == "NCHW" and "kernel_size" in known:
        options = {"kernel_size": 1, **options}
    return registry.make(name, **{"features": channels, **options})


def _named(message: Any) -> tuple[str, dict[str, Any]]:
    fits = isinstance(message, tuple) and len(message) == 2
    if not fits or not isinstance(message[0], str) or not isinstance(message[1], dict):
        raise OptionError(
            "message is the name of a block, (name, options), a module, or a function that makes one for a "
            f"number of channels; got {message!r}."
        )
    return message
