"""Differentiating through another library's loop that writes its buffers in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..errors import TransformError

__all__ = ["CHANGED", "differentiable"]

CHANGED = (
    "A tensor that f needs for its gradient was modified in place after f had used it; step optimisers and "
    "edit weights after the backward pass."
)


_NO_HOOKS = (
    "This solver's loop writes its buffers in place, which cannot be differentiated through under "
    "torch.func. Use adjoint='implicit', or a solver of this library."
)


class _Division(TorchFunctionMode):
    """Divisions by zero give zero, and zero as derivative.

    Broyden's update divides 0 by 0 for a row that stands still and overwrites the NaN; its derivative
    would stay NaN.
    """

    suspended = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        divides = func in (Tensor.__truediv__, Tensor.div, torch.div)
        if self.suspended or not divides or len(args) != 2 or not isinstance(args[1], Tensor) or kwargs:
            return func(*args, **kwargs)
        zero = args[1] == 0
        return torch.where(zero, 0.0, args[0] / torch.where(zero, 1.0, args[1]))


@contextlib.contextmanager
def differentiable() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Where gradients are recorded, keep a loop's buffers as they were when they were read.

    Histories that are written in place after autograd has saved views of them would make the backward
    pass raise; here what is saved is copied.

    Yields:
        A context to evaluate ``f`` in, so that what it saves is not copied and its divisions are its
        own.
    """
    if not torch.is_grad_enabled():
        yield contextlib.nullcontext
        return
    mode = _Division()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(saved_tensors_hooks(torch.clone, lambda saved: saved))
        except RuntimeError as error:  # torch.func switches such hooks off
            raise TransformError(_NO_HOOKS) from error
        stack.enter_context(mode)
        yield lambda: _plain(mode)


@contextlib.contextmanager
def _plain(mode: _Division) -> Iterator[None]:
    mode.suspended = True
    try:
        with saved_tensors_hooks(lambda saved: (saved, saved._version), _unchanged):
            yield
    finally:
        mode.suspended = False


def _unchanged(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:  # autograd's own test, which hooks switch off
        raise RuntimeError(CHANGED)
    return saved
