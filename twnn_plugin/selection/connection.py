"""What carries a layer's output back to its input, and how much it can say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import Aids, Feedback, SolveSettings
from ..blocks.message import LAYOUTS, layout_of
from ..blocks.wormhole import gate_factory
from ..constraints import orthogonal
from ..errors import OptionError, nearest
from .steps import StepNorm

__all__ = ["Connection", "Mixer"]

_MESSAGES = ("linear", "mixer")


@dataclass(frozen=True)
class Connection:
    """How the connections of a :class:`~twnn_plugin.selection.LayerSelection` are built.

    Attributes:
        scale: initial scale of what is sent.
        message: ``"linear"``: a normalisation and a projection of the channels; ``"mixer"``: a
            :class:`Mixer` before it, so that to iterate the layer is to add depth.
        hidden: channels within the mixer; 0: as many as the layer puts out.
        orthogonal: whether the projection is a multiple of an orthogonal matrix of an unconstrained one,
            the over-parameterisation of Mathur & Plis (2023), equation 6; see
            :func:`twnn_plugin.orthogonal`.
        contraction: a bound on the Lipschitz constant of the message, > 0; None: none. With
            ``"linear"`` alone.
        jacobian: weight of the penalty on the Jacobian of each solved map; see
            :meth:`~twnn_plugin.selection.LayerSelection.auxiliary_loss`.
        steps: whether 3-axis activations are time series: messages keep the time steps apart then, so that
            nothing looks into the future, and steps of zeros (padding) send nothing.
    """

    scale: float = 0.1
    message: str = "linear"
    hidden: int = 0
    orthogonal: bool = False
    contraction: float | None = None
    jacobian: float = 0.0
    steps: bool = False

    def __post_init__(self) -> None:
        if self.message not in _MESSAGES:
            hint = nearest(str(self.message), list(_MESSAGES))
            raise OptionError(f"Option message is one of {_MESSAGES}; got {self.message!r}.{hint}")
        if isinstance(self.hidden, bool) or not isinstance(self.hidden, int) or self.hidden < 0:
            raise OptionError(f"Option hidden is a number of channels, or 0; got {self.hidden!r}.")
        if self.hidden and self.message == "linear":
            raise OptionError(
                "Option hidden goes with message='mixer'; a linear message has no hidden layer."
            )
        if self.contraction is not None and self.orthogonal:
            raise OptionError("orthogonal and contraction both constrain the message: choose one of them.")
        Aids(contraction=self.contraction, jacobian=self.jacobian)

    def build(
        self, name: str, entry: Tensor, out: Tensor, settings: SolveSettings, channels_last: bool
    ) -> Feedback:
        """The self-loop of one layer.

        Args:
            name: of the layer.
            entry: (B, ...) an example of its input.
            out: (B, ...) of its output.
            settings: how it is solved.
            channels_last: whether 4-axis activations are (B, H, W, C).
        """
        layout = layout_of(out, channels_last)
        width = out.shape[LAYOUTS[layout]]
        path = None
        if self.message == "mixer":
            grid = layout in ("NCHW", "NHWC")
            path = Mixer(width, self.hidden or width, grid, LAYOUTS[layout] == -1, self.steps)
            path.to(out.device, out.dtype)
        gate = gate_factory("always")  # who is iterated is the policy's business
        aids = Aids(contraction=self.contraction, jacobian=self.jacobian)
        made = Feedback(
            f"{name}->{name}", entry, out, gate, None, settings, channels_last, self.scale, aids, path
        )
        if self.steps:
            made.message.add_module("norm", StepNorm(width))
        if self.orthogonal:
            orthogonal(made.message.project, rate=1.0)
        return made.to(out.device, out.dtype)


class Mixer(nn.Module):
    """Normalisation, 3x3 convolution (or a linear layer, where there is no grid), ReLU.

    With ``channels != hidden`` a projection back to the channels follows.

    Args:
        channels: of the state.
        hidden: of the convolution.
        grid: whether the state has two axes of positions.
        last: whether its channels are the last axis.
        steps: whether positions are time steps, to be kept apart; a step of zeros (padding) stays one.
    """

    def __init__(self, channels: int, hidden: int, grid: bool, last: bool, steps: bool = False):
        super().__init__()
        self.last, self.steps = last, steps
        self.norm: nn.Module = StepNorm(channels) if steps else nn.GroupNorm(1, channels)
        self.mix = nn.Conv2d(channels, hidden, 3, padding=1) if grid else nn.Linear(channels, hidden)
        self.back = None if hidden == channels else nn.Linear(hidden, channels)

    def forward(self, state: Tensor) -> Tensor:
        """(b, ...) to the same shape."""
        grid = isinstance(self.mix, nn.Conv2d)
        value = self.norm(state.movedim(-1, 1) if self.last else state)
        if not grid:
            value = value.movedim(1, -1)
        value = torch.relu(self.mix(value))
        if grid:
            value = value.movedim(1, -1)
        if self.back is not None:
            value = self.back(value)
        value = value if self.last or value.dim() == 2 else value.movedim(-1, 1)
        if self.steps:  # the biases would make something of padding
            value = torch.where((state != 0).any(dim=-1 if self.last else 1, keepdim=True), value, 0.0)
        return value
