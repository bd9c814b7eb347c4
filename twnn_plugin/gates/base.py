"""What a gate is: how much of a wormhole's message enters, sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError, nearest

__all__ = ["POOLINGS", "FollowsGate", "Gate", "GateOutput", "choose", "ordinary"]

POOLINGS = ("avg", "catavgmax")
"""What a gate may look at; see :attr:`Gate.pooling`."""


class GateOutput(NamedTuple):
    """A gate's opinion on a batch.

    Gates of each channel give (B, C) where it says so, C being the channels of the message.

    Attributes:
        probability: (B,) or (B, C) in [0, 1], differentiable: what the gate learns through.
        strength: (B,) or (B, C) in [0, 1], differentiable or constant: the factor on the message where
            the wormhole is open.
        open: (B,) bool: whether the gate itself would open.
        margin: (B,) score above the threshold, for gates that learn from difficulty; else None: the
            gate learns through its probability.
    """

    probability: Tensor
    strength: Tensor
    open: Tensor
    margin: Tensor | None = None


class FollowsGate:
    """Mark of a policy that iterates no sample which the gate leaves closed.

    Where the gate opens none, such a policy is not asked.
    """


class Gate(nn.Module, ABC):
    """Decides from pooled activations; one instance a wormhole.

    Factories registered as gates take ``channels`` (of the activations) and their own options; one that has
    an option ``pooling`` is given ``"catavgmax"`` for activations that have positions, unless the user says
    otherwise.

    Attributes:
        pooling: how activations are pooled, in timm's words. ``"avg"``: the (B, C) means over positions;
            ``"catavgmax"``: (B, 2 C), the means and then the maxima. What a mean drowns, such as an object
            that fills a corner, a maximum shows.
    """

    pooling: str = "avg"

    @abstractmethod
    def forward(self, features: Tensor) -> GateOutput:
        """Look at pooled activations of the span's open-loop output, (B, C) or (B, 2 C); see ``pooling``."""

    def glance(self, features: Tensor) -> Callable[[], Tensor] | None:
        """Whether :meth:`forward` would open no sample, if that can be told in few operations.

        Called without gradients in eval mode, before anything else is made of a pass: what most of a closed
        wormhole's cost is. On an accelerator a look at the answer is the one time that the host waits.

        Args:
            features: pooled activations, as :meth:`forward` gets them, but in float32 or float64
                whatever :attr:`dtype` is, and with NaN and infinities still in them, of which nothing must be
                concluded.

        Returns:
            None: some sample may open, ask :meth:`forward`. Else what gives the (B,) or (B, C)
            probabilities, for whoever wants to see them later.
        """
        return None

    def look(self, out: Tensor, layout: str) -> tuple[Callable[[], Tensor] | None] | None:
        """:meth:`glance` at activations that are not pooled yet, where that is quicker.

        Under an autocast it is asked as it is, where :meth:`glance` is asked without.

        Args:
            out: (B, ...) activations.
            layout: of their axes, see :data:`~twnn_plugin.blocks.message.LAYOUTS`.

        Returns:
            A tuple of what :meth:`glance` would return; None: pool them, and ask it.
        """
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that :meth:`forward` wants its features in."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def share(self) -> float:
        """The share of samples, in (0, 1), that counts as hard for gates that learn difficulty."""
        return 0.5

    def observe(self, steps: Tensor) -> None:
        """Called after each solve in training, with the (b,) replays that its open rows took."""

    def penalty(self) -> Tensor | None:
        """The gate's own part of the loss, a scalar, as of its last pass in training; None: it has none."""
        return None


def ordinary(value: Tensor) -> Tensor:
    """A value that a module may keep: no checkpoint can be loaded into a tensor made in inference mode."""
    # What is being compiled cannot ask, and is not broken off for it: no one trains in inference mode.
    if torch.compiler.is_compiling() or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def choose(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise :class:`~twnn_plugin.errors.OptionError` unless a gate's option is one of the known values."""
    if value not in known:
        shown = ", ".join(repr(k) for k in known)
        hint = nearest(str(value), [k for k in known if k is not None])
        raise OptionError(f"A gate's {name} is one of {shown}; got {value!r}.{hint}")
