"""Models of sequences: features or tokens in, a recurrent stack with or without wormholes, a readout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .staged import check_further

if TYPE_CHECKING:
    from twnn_plugin.sequence import StackState

__all__ = ["READOUTS", "SequenceModel"]

READOUTS = ("last", "mean", "all")


class SequenceModel(nn.Module):
    """Embedding, ``RecurrentStack``, linear readout.

    The embedding gives the first layer an input as wide as the stack, so that a message that comes back to it
    is not squeezed into a few features.

    Args:
        inputs: features of a step, or with ``tokens`` the size of the vocabulary.
        outputs: features of the answer.
        hidden: width of the embedding and of each layer.
        layers: how many.
        cell: ``"gru"`` or ``"lstm"``.
        readout: ``"last"``: answer from the last valid step; ``"mean"``: from the mean over valid steps;
            ``"all"``: one answer a step. The first two answer for the whole sequence, with ``causal``, too,
            which speaks of the stack's outputs: none of them depends on a later input.
        tokens: whether steps are token numbers.
        dropout: between layers.
        **stack: further options of :class:`twnn_plugin.sequence.RecurrentStack`: ``wormholes``, ``gate``,
            ``causal``, ``solver``, ``tol`` and the like.

    Raises:
        ConfigError: an unknown readout.
        OptionError: an unknown option or an impossible value.
        AttachError: wormholes that cannot be, or that ``causal`` forbids.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 32,
        layers: int = 1,
        cell: str = "gru",
        readout: str = "last",
        tokens: bool = False,
        dropout: float = 0.0,
        **stack: Any,
    ):
        super().__init__()
        # Here rather than above: importing twnn_plugin imports this module.
        from twnn_plugin.errors import nearest
        from twnn_plugin.sequence import RecurrentStack
        from twnn_plugin.sequence.stack import further_options

        check_further(SequenceModel, stack, further_options())
        if readout not in READOUTS:
            known = ", ".join(READOUTS)
            raise ConfigError(
                f"Unknown readout {readout!r}.{nearest(str(readout), READOUTS)} Readouts: {known}."
            )
        self.inputs, self.readout, self.tokens = inputs, readout, tokens
        self.embed: nn.Module = nn.Embedding(inputs, hidden) if tokens else nn.Linear(inputs, hidden)
        self.stack = RecurrentStack(cell, hidden, hidden, layers, dropout, **stack)
        self.head = nn.Linear(self.stack.output_size, outputs)

    def forward(self, x: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Sequences to answers.

        Args:
            x: (B, L, inputs), or (B, L) tokens.
            lengths: (B,) valid steps; what is padded has no influence.

        Returns:
            (B, outputs), or (B, L, outputs) with ``readout="all"``.
        """
        out, _ = self.stack(self._embedded(x), lengths=lengths, keep_state=False)
        sizes = None if lengths is None else torch.as_tensor(lengths, device=out.device)
        return self.head(self._read(out, sizes))

    def auxiliary_loss(self) -> Tensor:
        """What the wormholes add to the loss of the last training pass, a scalar; zero if nothing."""
        return self.stack.auxiliary_loss()

    def carry(self, x: Tensor, state: StackState | None = None) -> tuple[Tensor, StackState]:
        """One answer a step, and the state to go on with: for long texts and for generation.

        Args:
            x: (B, L, inputs), or (B, L) tokens.
            state: what the call before returned; detach it to cut the graph.
        """
        out, after = self.stack(self._embedded(x), state)
        assert after is not None
        return self.head(out), after

    def _embedded(self, x: Tensor) -> Tensor:
        wanted = "(B, L) whole numbers" if self.tokens else f"(B, L, {self.inputs})"
        good = x.dim() == 2 and not x.is_floating_point() if self.tokens else x.dim() == 3
        if not good or (not self.tokens and x.shape[2] != self.inputs):
            raise ConfigError(f"This model takes {wanted}; got {tuple(x.shape)} of {x.dtype}.")
        if self.tokens and x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.inputs:
            raise ConfigError(
                f"A token is outside the vocabulary of {self.inputs}: they go from {int(x.min())} to "
                f"{int(x.max())}."
            )
        return self.embed(x)

    def _read(self, out: Tensor, lengths: Tensor | None) -> Tensor:
        if self.readout == "all":
            return out
        count = torch.full((out.shape[0],), out.shape[1], device=out.device) if lengths is None else lengths
        if self.readout == "mean":  # padded steps are zero
            return out.sum(dim=1) / count.clamp_min(1)[:, None].to(out.dtype)
        index = (count - 1).clamp_min(0)[:, None, None].expand(-1, 1, out.shape[2])
        return out.gather(1, index).squeeze(1)
