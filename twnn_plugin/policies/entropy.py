"""The policy that looks at the prediction alone: a strong baseline that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import OptionError, nearest
from .base import SelectionPolicy
from .selection import Selection, SelectionView

__all__ = ["EntropyPolicy"]


class EntropyPolicy(SelectionPolicy):
    """Iterates one layer, once, where the prediction's entropy is above a threshold.

    Args:
        threshold: nats, >= 0; the threshold that gives a wanted share is a quantile of the entropies on
            validation data.
        layer: name of the layer to iterate; None: the last one.
    """

    def __init__(self, threshold: float = 0.5, layer: str | None = None):
        super().__init__()
        if not isinstance(threshold, (int, float)) or math.isnan(threshold) or threshold < 0:
            raise OptionError(f"Option threshold of policy 'entropy' must be >= 0 nats; got {threshold!r}.")
        self.threshold, self.layer = float(threshold), layer

    def bind(self, layers: Sequence[str], widths: Sequence[int]) -> None:
        if self.layer is not None and self.layer not in layers:
            raise OptionError(
                f"Option layer of policy 'entropy' must be one of {', '.join(layers)}; got {self.layer!r}."
                f"{nearest(self.layer, list(layers))}"
            )

    def select(self, view: SelectionView) -> Selection:
        count = len(view.layers)
        place = count - 1 if self.layer is None else view.layers.index(self.layer)
        goes = (view.entropy > self.threshold) & (view.step == 0)
        return Selection(Selection.of_actions(torch.where(goes, place + 1, 0), count))
