"""What a policy that picks among layers sees, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["Selection", "SelectionView"]


@dataclass(frozen=True)
class SelectionView:
    """The samples that still decide, before one decision (Mathur & Plis 2023, appendix A).

    Everything is detached: what a policy learns stays its own.

    Attributes:
        layers: names of the N layers that can be iterated.
        features: for each layer its (b, C) pooled activations, in at least float32.
        prices: (N,) what one evaluation of each layer and of all that follow it costs, as a share of the
            whole network's cost.
        step: decisions made before this one.
        counts: (b, N) how often the sample iterated each layer.
        last: (b,) its last choice, an index of ``layers``, or -1 before the first.
        repeats: (b,) how often in a row it made that choice, 0 before the first.
        spent: (b,) what it spent after the open-loop pass, as a share of the whole network's cost.
        residual: (b, N) residuals of its last solve of each layer, 0 before.
        logits: (b, K) its present prediction, before softmax.
        index: (b,) its place in the batch.
        skippable: for each layer, whether its output has the shape of its input, and so can be left out.
        adjacent: for each layer, whether the one before it in ``layers`` is the one before it in the network.
            Empty: all are.
    """

    layers: tuple[str, ...]
    features: tuple[Tensor, ...]
    prices: Tensor
    step: int
    counts: Tensor
    last: Tensor
    repeats: Tensor
    spent: Tensor
    residual: Tensor
    logits: Tensor
    index: Tensor
    skippable: tuple[bool, ...] = ()
    adjacent: tuple[bool, ...] = ()

    @property
    def rows(self) -> int:
        """b, the samples that decide."""
        return self.last.shape[0]

    @property
    def entropy(self) -> Tensor:
        """(b,) entropy of the present prediction in nats; the mean over positions where it has some."""
        logits = self.logits.float()
        log_p = logits.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return entropy if entropy.dim() == 1 else entropy.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Selection:
    """One decision for each of b samples.

    Attributes:
        layers: (b, N) bool, what to iterate; a row of False is NOP: the sample is done. Several layers in a
            row are iterated in one sweep from the first to the last.
        skip: (b, N) bool, what to leave out of what is computed again after an iterated layer: its input is
            its output; None: nothing.
        log_prob: (b,) of the decision, with the policy's graph; None: the policy does not learn.
        entropy: (b,) of the distribution it was drawn from, with its graph; None likewise.
        expected_price: (b,) of that distribution, with its graph; None likewise.
        baseline: (b,) the reward that the policy expects, with its graph; None likewise.
        preferred: (b, N) bool, what it would choose at inference, where ``layers`` was drawn; None: the same.
        distribution: (b, N + 1) what ``layers`` was drawn from, NOP first, with its graph; None likewise.
        weight: (b,) ones with the gradient of the probability of the decision (straight-through), which
            the iterated states are weighted with; None: the decision gets no gradient through them.
    """

    layers: Tensor
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    expected_price: Tensor | None = None
    baseline: Tensor | None = None
    weight: Tensor | None = None
    preferred: Tensor | None = None
    distribution: Tensor | None = None
    skip: Tensor | None = None

    @staticmethod
    def of_actions(actions: Tensor, count: int) -> Tensor:
        """(b, N) bool of (b,) actions, where 0 is NOP and l + 1 is layer l."""
        return torch.nn.functional.one_hot(actions, count + 1)[:, 1:].bool()

    def check(self, view: SelectionView, name: str) -> None:
        """Raise :class:`~twnn_plugin.errors.OptionError` unless this answers the view."""
        wanted = (view.rows, len(view.layers))
        if tuple(self.layers.shape) != wanted or self.layers.dtype != torch.bool:
            raise OptionError(
                f"Policy {name} must choose with {wanted} booleans, one for each sample and layer; it gave "
                f"{tuple(self.layers.shape)} of {self.layers.dtype}."
            )
        if self.skip is None:
            return
        if tuple(self.skip.shape) != wanted or self.skip.dtype != torch.bool:
            raise OptionError(
                f"Policy {name} must skip with {wanted} booleans; it gave {tuple(self.skip.shape)} of "
                f"{self.skip.dtype}."
            )
        for place, layer in enumerate(view.layers):
            if not view.skippable[place] and bool(self.skip[:, place].any()):
                raise OptionError(
                    f"Policy {name} skips layer {layer!r}, whose output has another shape than its input. "
                    "Skip only where view.skippable says so."
                )
