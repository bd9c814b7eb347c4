"""One training pass through a span: what must stand still while it is iterated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import AttachError
from ..trees import leaves
from .draws import random_state, restore, same
from .one_map import Frozen, OneMap

__all__ = ["OpenLoop"]

Out = TypeVar("Out")


class OpenLoop:
    """Watches a span's open-loop pass, then says what its replays must hold fixed.

    Args:
        one_map: the span's.
        entry: its (B, ...) input.
        training: whether the span is in training mode. In eval mode nothing needs to be held, unless a part
            of it is in training mode or normalises by batches all the same.
    """

    def __init__(self, one_map: OneMap, entry: Tensor, training: bool):
        self.one_map, self.entry = one_map, entry
        self.active = one_map.stirs(training)
        self.before = random_state(entry.device) if self.active else ()
        one_map.open_loop(self.active)

    def finish(self, out: Out, again: Callable[[], Out]) -> tuple[Out, Frozen | None]:
        """The open-loop output and the holder of statistics and draws (None if nothing is needed).

        Args:
            out: what the pass gave.
            again: replays the span on the same input. Used when random numbers were drawn, or batches are
                normalised by functions instead of layers: the pass is repeated with the same numbers, and
                this time they are kept. Also once, to see whether there are such functions.

        Raises:
            AttachError: a module changes its buffers whenever it runs, or the pass comes out otherwise when
                its statistics are held.
        """
        if not self.active:
            return out, None
        one_map = self.one_map
        one_map.open_loop(False)
        after = random_state(self.entry.device)
        drew = not same(self.before, after)
        if not one_map.needed(drew):
            return out, None
        frozen = Frozen(one_map.statistics(), one_map.held(), self.entry)
        if not drew and one_map.functional is False:
            return out, frozen
        new, buffers = one_map.functional is None, one_map.buffers()
        restore(self.entry.device, self.before)
        try:
            with frozen.record():
                recorded = again()
        finally:
            restore(self.entry.device, after)
        if new:
            one_map.functional, one_map.counts = bool(frozen.functional), frozen.spared
            one_map.check_unchanged(buffers)
            if not drew:  # kernels may draw otherwise than what stands in for them
                _check_same(out, recorded)
        if drew or one_map.functional:
            return recorded, frozen
        return out, frozen if frozen.statistics or frozen.modules or one_map.counts else None


def _check_same(out: Any, again: Any) -> None:
    """Raise if a pass with its own statistics held fixed is another one; rounding is let pass."""
    for a, b in zip(leaves(out), leaves(again), strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        half = a.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(a.device.type)
        given = torch.nan_to_num(a.detach())
        away = (given - torch.nan_to_num(b.detach())).abs()
        if a.numel() and bool(away.amax() > (0.1 if half else 0.01) * given.abs().amax()):
            raise AttachError(
                "A module of this span normalises batches in a way that cannot be held fixed while the span "
                "is iterated: with the statistics of this pass it gives something else than in the pass. "
                "Choose another span, or put that module into eval mode."
            )
