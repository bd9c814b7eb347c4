"""One recurrent layer on batch-first sequences: torch's own GRU or LSTM, with states batch first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = ["CELLS", "LayerOutputs", "LayerState", "RecurrentLayer"]

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}
_GATES = {"gru": 3, "lstm": 4}

LayerState = tuple[Tensor, ...]
"""What a layer carries from step to step: (h,) of a GRU, (h, c) of an LSTM; each (B, directions, H)."""


class RecurrentLayer(nn.Module):
    """A one-layer ``nn.GRU`` or ``nn.LSTM``; on a GPU, a call of cuDNN.

    Args:
        cell: ``"gru"`` or ``"lstm"``.
        inputs: features of a time step.
        hidden: width.
        bidirectional: read the sequence from both ends; outputs are (B, L, 2 hidden).
        bias: whether there are biases.
    """

    def __init__(self, cell: str, inputs: int, hidden: int, bidirectional: bool = False, bias: bool = True):
        super().__init__()
        self.cell, self.inputs, self.hidden = cell, inputs, hidden
        self.directions = 2 if bidirectional else 1
        self.rnn = CELLS[cell](inputs, hidden, bias=bias, batch_first=True, bidirectional=bidirectional)

    @property
    def outputs(self) -> int:
        """Features of a time step of the output."""
        return self.hidden * self.directions

    @property
    def parts(self) -> int:
        """Tensors in a :data:`LayerState`."""
        return 2 if self.cell == "lstm" else 1

    def fresh(self, x: Tensor) -> LayerState:
        """The state before a sequence: zeros for the rows of ``x``."""
        zeros = x.new_zeros(x.shape[0], self.directions, self.hidden)
        return (zeros,) * self.parts

    def multiply_adds(self, length: int) -> int:
        """Multiply-adds of one sequence, matrix products only."""
        each = _GATES[self.cell] * self.hidden * (self.inputs + self.hidden)
        return length * self.directions * each

    def forward(
        self, x: Tensor, state: LayerState, lengths: Tensor | None = None, keep: bool = True
    ) -> tuple[Tensor, LayerState]:
        """Run the layer.

        Args:
            x: (B, L, inputs).
            state: before the first step.
            lengths: (B,) valid steps of each row, 0 to L; None: all are.
            keep: whether the state after the last valid step is wanted.

        Returns:
            (B, L, outputs), zero at padded steps, and the state after the last valid step (meaningless
            without ``keep``).
        """
        if lengths is not None and (keep or self.directions == 2):
            return self._packed(x, state, lengths)
        out, after = self.rnn(x, self._torch(state))
        if lengths is not None:
            # One direction never looks ahead: what the padding gave is cut off.
            steps = torch.arange(x.shape[1], device=x.device)
            out = torch.where((steps < lengths[:, None])[..., None], out, 0.0)
        return out, self._ours(after)

    def _packed(self, x: Tensor, state: LayerState, lengths: Tensor) -> tuple[Tensor, LayerState]:
        # A packed sequence has at least one step; what an empty row gets from it is undone.
        packed = pack_padded_sequence(x, lengths.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.rnn(packed, self._torch(state))
        padded, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        some = (lengths > 0)[:, None, None]
        kept = zip(self._ours(after), state, strict=True)
        return torch.where(some, padded, 0.0), tuple(torch.where(some, new, old) for new, old in kept)

    def _torch(self, state: LayerState) -> Tensor | tuple[Tensor, ...]:
        turned = tuple(part.transpose(0, 1).contiguous() for part in state)
        return turned if self.parts == 2 else turned[0]

    def _ours(self, state: Tensor | tuple[Tensor, ...]) -> LayerState:
        parts = state if isinstance(state, tuple) else (state,)
        return tuple(part.transpose(0, 1) for part in parts)


class LayerOutputs(nn.Module):
    """A recurrent layer as a module of one tensor, from a fresh state and without padding.

    What blocks and policies that pick layers are made for: ``tw.blocks.get("fpi")(LayerOutputs(layer), x)``.

    Args:
        layer: of a stack, or one of its own.
    """

    def __init__(self, layer: RecurrentLayer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, inputs) to (B, L, outputs)."""
        return self.layer(x, self.layer.fresh(x), keep=False)[0]
