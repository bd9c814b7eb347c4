"""Replaying a chain of calls on other inputs: which argument comes from where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import AttachError
from ..trees import leaves, rebuild
from .trace import CallRecord

__all__ = ["Node", "Wiring", "wire"]

ENTRY = -1  # source index of the span's input


@dataclass(frozen=True)
class Node:
    """One call of the span.

    Attributes:
        path: the module's path, for messages.
        module: the module. Held in a tuple, so that it does not become a child of the holder.
        sources: for each leaf of (args, kwargs): (call, leaf of its output), or None for a constant.
        rowwise: for each leaf, whether it is a constant tensor with one row per sample.
    """

    path: str
    module: tuple[nn.Module]
    sources: tuple[tuple[int, int] | None, ...]
    rowwise: tuple[bool, ...]


@dataclass(frozen=True)
class Wiring:
    """A chain of calls with their wiring; ``replay`` runs it."""

    nodes: tuple[Node, ...]

    def modules(self) -> list[nn.Module]:
        """The modules of the chain, each once."""
        return list(dict.fromkeys(node.module[0] for node in self.nodes))

    def constants(self, seen: Sequence[tuple[Any, Any]]) -> tuple[Tensor, ...]:
        """The row-wise constants among the (args, kwargs) that the nodes were called with."""
        found: list[Tensor] = []
        for node, given in zip(self.nodes, seen, strict=True):
            found.extend(v for v, rowwise in zip(leaves(given), node.rowwise, strict=True) if rowwise)
        return tuple(found)

    def template(self, seen: Sequence[tuple[Any, Any]]) -> tuple[Any, ...]:
        """What the nodes were called with, without the activations and the row-wise constants."""
        kept = []
        for node, given in zip(self.nodes, seen, strict=True):
            marks = iter(zip(node.sources, node.rowwise, strict=True))

            def keep(leaf: Any, marks: Any = marks) -> Any:
                source, rowwise = next(marks)
                if source is not None or rowwise:
                    return None
                return leaf.detach() if isinstance(leaf, Tensor) else leaf

            kept.append(rebuild(given, keep))
        return tuple(kept)

    def replay(self, entry: Tensor, seen: Sequence[tuple[Any, Any]], rows: Sequence[Tensor] = ()) -> Any:
        """Call the chain on ``entry``.

        Args:
            entry: (b, ...) input of the first call.
            seen: the (args, kwargs) of each call in the model's own pass, for the constants.
            rows: the row-wise constants, gathered for the rows of ``entry``, in the order of
                :meth:`constants`.
        """
        outputs: list[list[Any]] = []
        fed = iter(rows)
        result: Any = None
        for node, given in zip(self.nodes, seen, strict=True):
            sources = iter(zip(node.sources, node.rowwise, strict=True))

            def pick(leaf: Any, sources: Any = sources) -> Any:
                source, rowwise = next(sources)
                if source is None:
                    return next(fed) if rowwise else leaf
                return entry if source[0] == ENTRY else outputs[source[0]][source[1]]

            args, kwargs = rebuild(given, pick)
            result = node.module[0](*args, **kwargs)
            outputs.append(list(leaves(result)))
        return result


def wire(calls: Sequence[CallRecord], other: Sequence[CallRecord], batches: tuple[int, int]) -> Wiring:
    """Wire a chain by the identity of tensors.

    Args:
        calls: the span's calls, in order, from a pass with ``batches[0]`` samples.
        other: the same from a pass with ``batches[1]`` samples, which tells constants with one row
            per sample from those without.
        batches: the two batch sizes.

    Raises:
        AttachError: the calls differ between the passes, or a constant's batch axis is folded.
    """
    if [c.path for c in calls] != [c.path for c in other]:
        raise AttachError("The model calls other modules for another batch size; it cannot be replayed.")
    if not calls[0].inputs() or not isinstance(calls[0].inputs()[0], Tensor):
        raise AttachError(f"{calls[0].path!r}, where the span begins, is not given a tensor first.")
    made: dict[int, tuple[int, int]] = {id(calls[0].inputs()[0]): (ENTRY, 0)}
    nodes = []
    for index, (call, twin) in enumerate(zip(calls, other, strict=True)):
        sources, rowwise = [], []
        for position, (leaf, same) in enumerate(zip(call.inputs(), twin.inputs(), strict=True)):
            # The message enters at the first call's first input only; elsewhere the same tensor is
            # the unchanged input, as it is in the model.
            known = made.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if known is not None and known[0] == ENTRY and (index, position) != (0, 0):
                known = None
            sources.append(known)
            rowwise.append(known is None and _rowwise(call.path, leaf, same, batches))
        nodes.append(Node(call.path, (call.module,), tuple(sources), tuple(rowwise)))
        for position, leaf in enumerate(leaves(call.output)):
            if isinstance(leaf, Tensor):
                made[id(leaf)] = (index, position)
    return Wiring(tuple(nodes))


def _rowwise(path: str, leaf: Any, twin: Any, batches: tuple[int, int]) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape == twin.shape:
        return False
    if (leaf.shape[0], twin.shape[0]) == batches and leaf.shape[1:] == twin.shape[1:]:
        return True
    raise AttachError(
        f"{path!r} is given a tensor that depends on the batch in a way that cannot be split by samples: "
        f"{tuple(leaf.shape)} for {batches[0]} samples and {tuple(twin.shape)} for {batches[1]}."
    )
