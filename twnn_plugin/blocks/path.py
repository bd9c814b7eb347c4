"""What may stand on a message's way back."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the documented common base of BatchNorm layers
from torch.nn.modules.dropout import _DropoutNd

from ..errors import MapError, OptionError
from .draws import random_state, same

__all__ = ["check_path"]


def check_path(path: nn.Module, state: Tensor, contraction: float | None) -> None:
    """Refuse a module that a message cannot go through.

    It is tried on random states, where it has values at all.

    Args:
        path: the module.
        state: (B, ...) an example of the span's output; its values do not matter.
        contraction: a bound that the message is to keep; None: none.

    Raises:
        OptionError: not a module, one that makes each application another map (batch normalisation, dropout,
            random numbers), or one beside a bound on the message, which does not know what the module does to
            distances.
        MapError: it does not map a state to a state of the same shape, sample by sample.
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
    modes = [(part, part.training) for part in path.modules()]
    try:
        path.train()
        with torch.no_grad():
            _try(path, _example(path, state))
    finally:
        for part, mode in modes:
            part.training = mode


def _try(path: nn.Module, given: Tensor) -> None:
    """Raise unless a path maps states to states, one by one and always in the same way."""
    kind, shape = f"The message's path, a {type(path).__name__},", tuple(given.shape)
    before, buffers = random_state(given.device), [(b, b.clone()) for b in path.buffers()]
    try:
        made = path(given)
    except (RuntimeError, TypeError, ValueError) as error:  # a shape, a layout, a number of arguments
        reason = str(error).strip().splitlines()[0]
        raise MapError(f"{kind} cannot take a state {shape}: {reason}") from error
    if not isinstance(made, Tensor) or made.shape != given.shape:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise MapError(f"{kind} must map a state {shape} to one of the same shape; it returned {got}.")
    if given.is_meta:
        return
    changed = [b for b, old in buffers if not torch.equal(b, old)]
    for buffer, old in buffers:
        buffer.copy_(old)
    if changed or not same(before, random_state(given.device)):
        what = "changes a buffer of its own" if changed else "draws random numbers"
        raise OptionError(f"{kind} {what} in training, which makes each step of the iteration another map.")
    if not torch.allclose(path(given[:1]), made[:1], rtol=1e-3, atol=1e-4):
        raise MapError(
            f"{kind} gives a sample something else among others than alone, so that rows could not leave the "
            "solve. Let it treat samples one by one."
        )


def _example(path: nn.Module, state: Tensor) -> Tensor:
    """Random states on the module's device, in its dtype."""
    like = next((t for t in chain(path.parameters(), path.buffers()) if t.is_floating_point()), None)
    device, dtype = (state.device, state.dtype) if like is None else (like.device, like.dtype)
    if device.type == "meta" and like is None:
        device = torch.device("cpu")
    if device.type == "meta":
        return torch.empty(state.shape, dtype=dtype, device=device)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(state.shape, generator=generator, device="cpu").to(device, dtype)
