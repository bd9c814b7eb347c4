"""Nested tuples, lists and dicts as lists of leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["leaves", "rebuild", "take"]


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of a nested tuple, list or dict, in order."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from leaves(value)
    else:
        yield tree


def rebuild(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with ``change`` applied to every leaf, visited in the order of :func:`leaves`."""
    if isinstance(tree, dict):
        return {key: rebuild(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rebuild(value, change) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(rebuild(value, change) for value in tree)
    return change(tree)


def take(tree: Any, rows: Tensor) -> Any:
    """The tree with the (n,) ``rows`` of every tensor; what is no tensor is left alone."""
    return rebuild(tree, lambda leaf: leaf.index_select(0, rows) if isinstance(leaf, Tensor) else leaf)
