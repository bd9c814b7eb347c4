"""One training pass through a span: what must stand still while it is iterated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .draws import random_state, restore, same
from .one_map import Frozen, OneMap

__all__ = ["OpenLoop"]


class OpenLoop:
    """Watches a span's open-loop pass, then says what its replays must hold fixed.

    Args:
        one_map: the span's.
        entry: its (B, ...) input.
        training: whether the span is in training mode; in eval mode nothing needs to be held.
    """

    def __init__(self, one_map: OneMap, entry: Tensor, training: bool):
        self.one_map, self.entry, self.training = one_map, entry, training
        self.before = random_state(entry.device) if training else ()
        one_map.open_loop(training)

    def finish(self, out: Tensor, again: Callable[[], Tensor]) -> tuple[Tensor, Frozen | None]:
        """The open-loop output and the holder of statistics and draws (None if nothing is needed).

        Args:
            out: what the pass gave.
            again: replays the span on the same input. Used when random numbers were drawn: the
                pass is repeated with the same ones, and this time they are kept.
        """
        if not self.training:
            return out, None
        self.one_map.open_loop(False)
        after = random_state(self.entry.device)
        drew = not same(self.before, after)
        if not self.one_map.needed(drew):
            return out, None
        frozen = Frozen(self.one_map.statistics(), self.one_map.counters(), self.entry)
        if drew:
            restore(self.entry.device, self.before)
            with frozen.record():
                out = again()
            restore(self.entry.device, after)
        return out, frozen
