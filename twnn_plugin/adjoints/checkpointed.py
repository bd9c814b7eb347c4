"""Differentiating through the iterations in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..solvers import Outcome
from ..solvers.inplace import CHANGED
from ..types import AdjointReport, State
from .base import Adjoint
from .equation import Call
from .held import Held
from .unrolled import Unrolled

__all__ = ["Checkpointed"]


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


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """Unrolled, but each evaluation of ``f`` is recomputed in the backward pass.

    The same gradient as ``unrolled``. Of each iteration only the state is kept, not the inside of
    ``f``; the price is one more evaluation per iteration.
    """

    exact: ClassVar[bool] = False

    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        if not torch.is_grad_enabled():
            return call.solve()
        inner = _Unchanged(call.f)  # the backward pass evaluates it again

        def recomputed(z: State, *context: Tensor) -> State:
            return checkpoint(inner, z, *context, use_reentrant=False)  # type: ignore[return-value]

        watched = replace(call, f=recomputed)
        outcome = Unrolled().run(watched, reports)
        call.evaluations = watched.evaluations
        return outcome
