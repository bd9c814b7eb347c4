"""Whether two functions are one map, made twice."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..solvers.hosting import Alike

__all__ = ["same"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def same(a: Any, b: Any) -> bool:
    """Whether ``a`` and ``b`` do the same: equal code that holds on to equal things.

    A model's forward makes the function that it solves for anew in each pass. Two of them are one map if
    their code is one, and what they close over is the same object, an equal plain value or an equal tensor.

    Args:
        a: a function, method, ``partial`` or module; or, within those, anything.
        b: likewise.
    """
    return _same(a, b, set())


def _same(a: Any, b: Any, under_way: set[tuple[int, int]]) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and torch.equal(a, b)
    if isinstance(a, (*_PLAIN, *_TORCH)):
        return bool(a == b)
    pair = (id(a), id(b))
    if pair in under_way:  # a function that closes over itself
        return True
    under_way.add(pair)
    if isinstance(a, Alike):
        return _same(a.likeness(), b.likeness(), under_way)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key], under_way) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y, under_way) for x, y in zip(a, b, strict=True))
    if isinstance(a, FunctionType):
        return a.__code__ is b.__code__ and _same(_held(a), _held(b), under_way)
    if isinstance(a, MethodType):
        return a.__self__ is b.__self__ and _same(a.__func__, b.__func__, under_way)
    if isinstance(a, partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), under_way)
    return False


def _held(function: FunctionType) -> tuple[Any, ...]:
    """What a function holds on to: its defaults and the contents of its closure."""
    cells = function.__closure__ or ()
    return (function.__defaults__, function.__kwdefaults__, *(_content(cell) for cell in cells))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return Ellipsis
