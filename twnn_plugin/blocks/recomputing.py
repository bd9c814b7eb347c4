"""Seeing that a part of a span is computed again in the backward pass, not by our own checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from ..errors import AttachError
from ..trees import leaves

__all__ = ["Lookout", "refuse_recomputed"]

_REENTRANT = "CheckpointFunction"  # what torch and others call theirs


class Lookout:
    """Looks, at places of a replay where something is held fixed, whether these are computed again later.

    ``torch.utils.checkpoint`` catches what is saved for the backward pass; so whether a tensor that is saved
    at such a place comes here tells it.
    """

    def __init__(self) -> None:
        self.seen = False
        self.recomputed = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, tensors that are saved come here, unless somebody else catches them."""
        with saved_tensors_hooks(self._pack, nn.Identity()):
            yield

    def _pack(self, value: Tensor) -> Tensor:
        self.seen = True
        return value.detach()  # an output that was kept itself would keep its own graph alive

    def look(self) -> None:
        """Called at a place where something is held fixed."""
        self.seen = False
        with torch.enable_grad():
            torch.ones((), requires_grad=True).exp()
        self.recomputed = self.recomputed or not self.seen


def refuse_recomputed(lookout: Lookout, result: Any, entry: Tensor) -> None:
    """Raise if a part of a replay would be computed again without what it was computed with.

    Args:
        lookout: of the replay.
        result: what the replay gave, with its graph.
        entry: (B, ...) what it was given; what was computed before does not matter.

    Raises:
        AttachError: it would.
    """
    before = set(_nodes([entry], set()))
    found = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
    if lookout.recomputed or any(_REENTRANT in type(node).__name__ for node in _nodes(found, before)):
        raise AttachError(
            "A module of this span computes a part of itself again in the backward pass "
            "(torch.utils.checkpoint), without the batch statistics and random numbers that are held fixed "
            "while the span is iterated, so that gradients would be wrong. Leave that out; "
            "model.set_grad_checkpointing(), which every model with attached wormholes has, saves the same "
            "memory."
        )


def _nodes(values: Iterable[Tensor], but: set[Node]) -> Iterator[Node]:
    """The nodes of the graphs of some tensors, as far as they lie behind those of ``but``."""
    waiting = [value.grad_fn for value in values]
    known = set(but)
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]
