"""One training pass through a span: what must stand still while it is iterated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import transforms
from ..errors import AttachError
from ..trees import leaves
from .draws import random_state, restore, same
from .one_map import Frozen, OneMap
from .recomputing import Lookout, refuse_recomputed

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
        if self.active or one_map.watching:  # a pass that broke off is watched until the next one
            one_map.open_loop(self.active)
        if not self.active and one_map.hooks:
            one_map.deafen()

    def finish(self, out: Out, again: Callable[[], Out]) -> tuple[Out, Frozen | None]:
        """The open-loop output and the holder of statistics and draws (None if nothing is needed).

        Args:
            out: what the pass gave.
            again: replays the span on the same input. Used when random numbers were drawn, or batches are
                normalised by functions instead of layers: the pass is repeated with the same numbers, and
                this time they are kept. Also once, to see whether there are such functions.

        Raises:
            AttachError: a module changes its buffers whenever it runs, the pass comes out otherwise when
                its statistics are held, a normalisation lost its statistics but not the flag for them, or
                the pass is one within the replay of another span that holds its normalisations.
        """
        one_map = self.one_map
        if not self.active:
            untold = one_map.untold()
            if untold is not None:
                raise AttachError(
                    f"A {untold} of this span has track_running_stats=True but no running statistics, so "
                    "that it normalises by batches and nothing says so. Set track_running_stats=False, too."
                )
            return out, None
        one_map.open_loop(False)
        one_map.check_outermost()
        after = random_state(self.entry.device)
        drew = not same(self.before, after)
        if not one_map.needed(drew):
            return out, None
        frozen = Frozen(one_map.statistics(), one_map.held(), self.entry, one_map.listen, one_map.holders)
        if not drew and one_map.functional is False:
            self._look(frozen, again)
            return out, frozen
        new, buffers = one_map.functional is None, one_map.buffers()
        wanted = drew or bool(one_map.functional)  # else nobody needs the graph of what is recorded

        def record() -> Out:
            restore(self.entry.device, self.before)
            try:
                with frozen.record(), torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                    return again()
            finally:
                restore(self.entry.device, after)

        recorded = record()
        functional = bool(frozen.functional) if new else bool(one_map.functional)
        if functional and not wanted:
            wanted = True
            recorded = record()
        if new:
            one_map.check_unchanged(buffers)
            one_map.counts = frozen.spared
            # Where numbers are drawn, kernels may draw otherwise than what stands in for them.
            with torch.no_grad():
                alike = drew or _same_map(out, recorded, frozen, again)
            if alike:
                one_map.functional = functional
        self._look(frozen, again)
        if drew or functional:
            return recorded, frozen
        return out, frozen if frozen.statistics or frozen.modules or one_map.counts else None

    def _look(self, frozen: Frozen, again: Callable[[], Any]) -> None:
        """Once, where there are gradients: refuse what is computed again without what is held fixed."""
        held = frozen.statistics or frozen.functional or frozen.draws
        if self.one_map.looked or not held or not torch.is_grad_enabled() or transforms.active():
            return
        lookout = frozen.lookout = Lookout()
        try:
            with lookout.watching(), frozen.replay(None):
                found = again()
        finally:
            frozen.lookout = None
        refuse_recomputed(lookout, found, self.entry)
        self.one_map.looked = True


def _same_map(out: Any, again: Any, frozen: Frozen, replay: Callable[[], Any]) -> bool:
    """Whether a pass with its own statistics held fixed is seen to be the same pass.

    Rounding is let pass. Of very few values (a map of one position, two samples) it can be as large as the
    values are: then nothing is seen, and the next pass has to tell. Nor is anything under ``vmap``.

    Raises:
        AttachError: it is another one.
    """
    tensors = [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]
    if any(map(transforms.many, tensors)):
        return False
    dtypes = [leaf.dtype for leaf in tensors if leaf.is_floating_point()]
    device = frozen.device.type
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    away = _distance(out, again)
    if away <= (0.1 if rounding > 1e-4 else 0.01):
        return True
    with frozen.shaken(4 * rounding), frozen.replay(None):
        shaken = replay()
    with frozen.replay(None):
        replay()  # whatever it leaves behind is that of the statistics as they are
    if 10 * _distance(again, shaken) >= away:
        return False
    raise AttachError(
        "A module of this span normalises batches in a way that cannot be held fixed while the span "
        "is iterated: with the statistics of this pass it gives something else than in the pass. "
        "Choose another span, or put that module into eval mode."
    )


def _distance(out: Any, again: Any) -> float:
    """The largest difference of two nested results, relative to the first one's largest value."""
    found = 0.0
    for a, b in zip(leaves(out), leaves(again), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel():
            given = torch.nan_to_num(a.detach())
            away = (given - torch.nan_to_num(b.detach())).abs().amax() / given.abs().amax()
            found = max(found, float(torch.nan_to_num(away, nan=0.0)))
    return found
