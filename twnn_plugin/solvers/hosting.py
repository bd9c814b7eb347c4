"""Handing solves over to somebody who merges them.

While a host is in charge of a thread, :func:`~twnn_plugin.solvers.driver.solve` asks it first. The host
may keep the call until other solves of the same equation have brought it rows to share a batch with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from .base import Control, Outcome, Problem, Solver

__all__ = ["Alike", "Host", "current", "hosted"]


class Alike(ABC):
    """Something that a map holds on to and that is made anew in each pass of a model."""

    @abstractmethod
    def likeness(self) -> Any:
        """All that its behaviour depends on: where two agree in it, they do the same."""


Ordinary = Callable[[Solver, Problem, Tensor, Control], Outcome]
"""What would solve if there were no host."""


class Host(Protocol):
    """Solves on behalf of the driver."""

    def solve(
        self, solver: Solver, problem: Problem, z: Tensor, control: Control, ordinary: Ordinary
    ) -> Outcome:
        """The outcome for the (B, D) starting states ``z``, B and D at least 1.

        Args:
            solver: the method.
            problem: the equation; ``evaluations`` is counted up by the rows that were evaluated.
            z: the starting states.
            control: when a row is finished.
            ordinary: for solves that the host does not want; to be called under ``hosted(None)``, since
                a solve within a solve must not be kept.
        """
        ...


_host: ContextVar[Host | None] = ContextVar("host", default=None)

current = _host.get
"""Who is in charge of this thread; None: nobody."""


@contextmanager
def hosted(host: Host | None) -> Iterator[None]:
    """Within this, in this thread, solves go to ``host``."""
    token = _host.set(host)
    try:
        yield
    finally:
        _host.reset(token)
