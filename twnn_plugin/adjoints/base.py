"""What an adjoint is: how the derivatives of a solve are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from ..errors import TransformError
from ..solvers.base import Outcome
from ..types import AdjointReport
from .equation import Call

__all__ = ["Adjoint"]


class Adjoint(ABC):
    """A way to differentiate ``z = fix(f, z0, *context)``.

    Write it as a frozen dataclass whose fields are its options.

    Attributes:
        exact: whether the gradient is the fixed point's own up to a tolerance (documentation and
            reports say which).
    """

    exact: ClassVar[bool]

    @abstractmethod
    def run(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        """Solve the equation of ``call`` so that the outcome's value carries derivatives.

        Args:
            call: the equation, the starting state, the solver and when to stop.
            reports: append an :class:`~twnn_plugin.types.AdjointReport` here when a backward solve ran.
        """

    def run_transformed(self, call: Call, reports: list[AdjointReport]) -> Outcome:
        """``run`` inside ``torch.func`` transforms or forward-mode AD.

        An adjoint that cannot be transformed raises rather than be wrong.
        """
        raise TransformError(
            f"Adjoint {type(self).__name__} works with .backward() and torch.autograd.grad alone, not inside "
            "torch.func transforms or forward-mode AD. Use adjoint='implicit', which is closed under them."
        )
