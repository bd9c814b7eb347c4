"""The policy that looks at the prediction alone: a strong baseline that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError, nearest
from .base import SelectionPolicy
from .drawing import check_weights, drawn_layers
from .numbers import check_number
from .selection import Selection, SelectionView

__all__ = ["EntropyPolicy"]

_THRESHOLD = 0.5


class EntropyPolicy(SelectionPolicy):
    """Iterates one layer, once, where the prediction's entropy is high.

    In use, above a threshold: each sample is decided about by itself. In training a threshold would open few
    samples once the network is sure of itself; there a ``share`` of each batch, the samples of the highest
    entropy, keeps the open path learning, and learning from those that it will answer for.

    Args:
        threshold: nats, >= 0; the threshold that gives a wanted share is a quantile of the entropies on
            validation data. None: 0.5, unless ``share`` is given.
        layer: name of the layer to iterate; None: the last one, unless ``weights`` are given.
        share: in [0, 1], of each batch, rounded to whole samples, instead of a threshold; who is iterated
            then depends on the others in the batch.
        weights: among layers, how much more often each is drawn than the others, >= 0, from torch's global
            generator, instead of one ``layer``.
    """

    def __init__(
        self,
        threshold: float | None = None,
        layer: str | None = None,
        share: float | None = None,
        weights: Sequence[float] | None = None,
    ):
        super().__init__()
        for one, other in (
            (("threshold", threshold), ("share", share)),
            (("layer", layer), ("weights", weights)),
        ):
            if one[1] is not None and other[1] is not None:
                raise OptionError(
                    f"Options {one[0]} and {other[0]} of policy 'entropy' exclude each other; got "
                    f"{one[1]!r} and {other[1]!r}. Leave one of them out."
                )
        if share is not None:
            check_number("entropy", "share", share, "in [0, 1]", lambda value: 0 <= value <= 1)
        threshold = _THRESHOLD if threshold is None else threshold
        if not isinstance(threshold, (int, float)) or math.isnan(threshold) or threshold < 0:
            raise OptionError(f"Option threshold of policy 'entropy' must be >= 0 nats; got {threshold!r}.")
        self.threshold, self.layer, self.share = float(threshold), layer, share
        self.weights = check_weights("entropy", weights)

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        check_weights("entropy", self.weights, layers)
        if self.layer is not None and self.layer not in layers:
            raise OptionError(
                f"Option layer of policy 'entropy' must be one of {', '.join(layers)}; got {self.layer!r}."
                f"{nearest(self.layer, list(layers))}"
            )

    def select(self, view: SelectionView) -> Selection:
        goes = self._uncertain(view.entropy) & (view.step == 0)
        return Selection(Selection.of_actions(torch.where(goes, self._layers(view) + 1, 0), len(view.layers)))

    def _uncertain(self, entropy: Tensor) -> Tensor:
        if self.share is None:
            return entropy > self.threshold
        known = entropy.nan_to_num(nan=-1.0)  # a broken sample takes no other's place
        most = known.topk(round(self.share * known.numel())).indices
        return torch.zeros_like(entropy, dtype=torch.bool).index_fill(0, most, True)

    def _layers(self, view: SelectionView) -> Tensor:
        if self.weights is not None:
            return drawn_layers(view, self.weights)
        place = len(view.layers) - 1 if self.layer is None else view.layers.index(self.layer)
        return torch.full_like(view.last, place)
