"""Whether the compiled kernels are there, wanted, and fit for a tensor."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from .. import transforms
from ..errors import OptionError

__all__ = ["available", "describe", "disabled", "library", "reads", "takes", "threads"]

_SWITCH = "TWNN_KERNELS"
_VERSION = 11  # of the arguments, as in rows.c
_GRAIN = 32768  # numbers below which two threads cost more than they save; torch's own grain
_REAL = (torch.float32, torch.float64)
_off: ContextVar[bool] = ContextVar("kernels_off", default=False)


def _load() -> tuple[ModuleType | None, str]:
    wanted = os.environ.get(_SWITCH, "1")
    if wanted not in ("0", "1"):
        raise OptionError(f"{_SWITCH} must be 0 (do without the compiled kernels) or 1; got {wanted!r}.")
    if wanted == "0":
        return None, f"switched off by {_SWITCH}=0"
    try:
        module = importlib.import_module("._rows", __package__)
    except ImportError as error:
        return None, f"not built: install the package again where there is a C compiler ({error})"
    if getattr(module, "VERSION", None) != _VERSION:
        return None, "built from other sources: install the package again"
    return module, "in use" if module.THREADED else "in use, by one thread each (built without OpenMP)"


library, _state = _load()


def available() -> bool:
    """Whether solves on the CPU use compiled kernels here and now."""
    return library is not None and not _off.get()


def describe() -> str:
    """Whether they do, and if not, why."""
    return "switched off by disabled()" if library is not None and _off.get() else _state


@contextmanager
def disabled() -> Iterator[None]:
    """Where solves use operations of torch alone, to compare."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def takes(z: Tensor) -> bool:
    """Whether a solve from the (b, D) matrix ``z`` may use compiled kernels.

    They see memory, not tensors: derivatives, transformations and subclasses of tensors pass them by.
    """
    if torch.is_grad_enabled() or not reads(z):
        return False
    assert library is not None
    return library.THREADED or z.numel() <= _GRAIN or torch.get_num_threads() == 1


def reads(*tensors: Tensor) -> bool:
    """Whether compiled kernels may look at tensors, (b, D) matrices or others, without a graph."""
    if not available() or transforms.active():
        return False
    return all(type(x) is Tensor and x.is_cpu and x.dtype in _REAL and not x.requires_grad for x in tensors)


def threads(z: Tensor) -> int:
    """How many threads share the rows of the (b, D) matrix ``z``: as many as have enough to do."""
    worth = z.numel() // (_GRAIN // 2)
    return 1 if worth < 2 else min(torch.get_num_threads(), z.shape[0], worth)
