"""What a stack carries from one call to the next, in our form and in torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MapError
from .layer import LayerState, RecurrentLayer
from .spec import TemporalSpec

__all__ = ["StackState", "moved_on", "state_before"]


@dataclass(frozen=True)
class StackState:
    """What a stack carries from one call to the next.

    Attributes:
        layers: of each layer (h,) or (h, c), each (B, directions, H).
        tails: of each wormhole (B, d, H): the last outputs of its source, d its delay in time.
    """

    layers: tuple[LayerState, ...]
    tails: tuple[Tensor, ...] = ()

    def detach(self) -> StackState:
        """The same values without their graph, for truncated backpropagation through time."""
        return self.mapped(Tensor.detach)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StackState:
        """With ``change`` applied to every tensor; the batch is the first axis of each."""
        layers = tuple(tuple(change(part) for part in state) for state in self.layers)
        return StackState(layers, tuple(change(tail) for tail in self.tails))

    def torch(self) -> Tensor | tuple[Tensor, Tensor]:
        """As ``nn.GRU`` (h_n) and ``nn.LSTM`` (h_n, c_n) return it: (layers * directions, B, H) each."""
        turned = (torch.cat(parts, dim=1).transpose(0, 1) for parts in zip(*self.layers, strict=True))
        stacked = [part.contiguous() for part in turned]  # cuDNN takes no other back
        return stacked[0] if len(stacked) == 1 else (stacked[0], stacked[1])


def state_before(
    state: StackState | Tensor | tuple[Tensor, Tensor] | None,
    x: Tensor,
    layers: Sequence[RecurrentLayer],
    specs: Sequence[TemporalSpec],
) -> StackState:
    """The state before the first step, in whatever form it was given.

    Args:
        state: what a call returned, torch's h_0 or (h_0, c_0), or None for zeros.
        x: (B, L, C) the input, for the batch size, the dtype and the device.
        layers: of the stack.
        specs: its wormholes.

    Raises:
        MapError: the state is of another stack or batch.
    """
    fresh = StackState(
        tuple(layer.fresh(x) for layer in layers),
        tuple(x.new_zeros(x.shape[0], max(spec.delay, 0), layers[spec.source].outputs) for spec in specs),
    )
    if state is None:
        return fresh
    if not isinstance(state, StackState):
        state = _from_torch(state, x, layers)
    state = StackState(state.layers, state.tails or fresh.tails)
    shapes, wanted = _shapes(state), _shapes(fresh)
    if shapes != wanted:
        raise MapError(f"The state has parts of shapes {shapes}; this stack and batch need {wanted}.")
    return state


def moved_on(tail: Tensor, out: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, d, H): the last d valid outputs, those of ``tail``, before the first step, included."""
    delay = tail.shape[1]
    if not delay:
        return tail
    whole = torch.cat([tail, out], dim=1)
    if lengths is None:
        return whole[:, whole.shape[1] - delay :]
    index = lengths[:, None] + torch.arange(delay, device=out.device)
    return whole.gather(1, index[..., None].expand(-1, -1, out.shape[2]))


def _shapes(state: StackState) -> tuple[list[list[tuple[int, ...]]], list[tuple[int, ...]]]:
    layers = [[tuple(part.shape) for part in layer] for layer in state.layers]
    return layers, [tuple(tail.shape) for tail in state.tails]


def _from_torch(
    state: Tensor | tuple[Tensor, Tensor], x: Tensor, layers: Sequence[RecurrentLayer]
) -> StackState:
    parts = state if isinstance(state, tuple) else (state,)
    first = layers[0]
    wanted = (len(layers) * first.directions, x.shape[0], first.hidden)
    if len(parts) != first.parts or any(tuple(part.shape) != wanted for part in parts):
        what = "(h_0, c_0)" if first.parts == 2 else "h_0"
        raise MapError(
            f"The state of this stack is a StackState, or torch's {what} of shape {wanted}; got "
            f"{[tuple(part.shape) for part in parts]}."
        )
    cut = [part.transpose(0, 1).split(first.directions, dim=1) for part in parts]
    return StackState(tuple(zip(*cut, strict=True)))
