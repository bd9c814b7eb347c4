"""Differentiating through the iterations in less memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..solvers import Outcome
from ..solvers.inplace import CHANGED
from ..trees import leaves
from ..types import AdjointReport, State
from .base import Adjoint
from .equation import Call
from .held import Held
from .unrolled import Unrolled

__all__ = ["Checkpointed"]


_OTHER = (
    "f gave another value when the backward pass of adjoint 'checkpointed' evaluated it again: what it reads "
    "has changed since. Let it read parameters and buffers of modules, or context; edit them after the "
    "backward pass; or use adjoint='unrolled'."
)


class _Unchanged:
    """A function held as it is, whose parameters nobody may write to before it is evaluated again.

    Args:
        function: as the user gave it.
    """

    def __init__(self, function: Callable[..., State]):
        self._function = Held(function)
        self._versions = [(tensor, tensor._version) for tensor in self._function.learned()]

    def __call__(self, *arguments: Any) -> State:
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(CHANGED)  # as autograd does, which has saved nothing to compare with
        return self._function(*arguments)


class _Twice:
    """One evaluation, which must give the same when it is made again: checkpoint compares shapes alone.

    It does not where ``f`` has come to read other values, from places that :class:`Held` does not know. One
    of the last evaluations shows that as well as all of them.

    Args:
        function: what is evaluated.
        newest: who was evaluated last, and what came out; shared by the evaluations of a solve.
    """

    def __init__(self, function: Callable[..., State], newest: deque[tuple[object, list[Tensor]]]):
        self._function, self._newest, self._again = function, newest, False
        self._mark = object()  # itself would be in a circle with what holds it

    def __call__(self, *arguments: Any) -> State:
        value = self._function(*arguments)
        found = [leaf.detach() for leaf in leaves(value)]
        if not self._again:
            self._again = True
            self._newest.append((self._mark, found))
            return value
        for who, known in self._newest:
            if who is self._mark and not all(map(_alike, found, known)):
                raise RuntimeError(_OTHER)
        return value


def _alike(x: Tensor, known: Tensor) -> bool:
    """Whether two evaluations differ by rounding alone, as far as they are finite."""
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = max(dtype, torch.get_autocast_dtype(device), key=lambda one: torch.finfo(one).eps)
    # What is not finite says nothing; and kernels may add up in any order.
    apart, known = ((v.nan_to_num(0.0, 0.0, 0.0)) for v in (x - known, known))
    norm, bound = torch.linalg.vector_norm, torch.finfo(dtype).eps ** 0.5
    return not bool(norm(apart) > bound * norm(known))


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Unrolled, but each evaluation of ``f`` is recomputed in the backward pass.

    The same gradient as ``unrolled``. What is inside of ``f`` is not kept; the price is one more evaluation
    per iteration. Of each iteration the state is kept, which is all with ``picard``, and what an accelerated
    solver records of its own: some nine states a step with ``anderson``.
    """

    exact: ClassVar[bool] = False

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        if not torch.is_grad_enabled():
            return call.solve()
        inner = _Unchanged(call.f)  # the backward pass evaluates it again
        newest: deque[tuple[object, list[Tensor]]] = deque(maxlen=2)  # the last of all may not be used

        def recomputed(z: State, *context: Tensor) -> State:
            with set_checkpoint_early_stop(False):  # to the end, where the values are compared
                return checkpoint(_Twice(inner, newest), z, *context, use_reentrant=False)  # type: ignore[return-value]

        watched = replace(call, f=recomputed)
        outcome = Unrolled().run(watched, reports)
        call.evaluations = watched.evaluations
        return outcome
