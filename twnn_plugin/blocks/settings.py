"""How a span is solved: the part of a wormhole that can be swapped by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .. import adjoints, solvers
from ..adjoints import Adjoint
from ..errors import OptionError, nearest
from ..fixed_point import check_control
from ..solvers import Control, Solver

__all__ = ["SolveSettings", "check_names", "option_names"]


def option_names(function: Callable[..., Any], *without: str) -> list[str]:
    """What a function, or a class when it is made, takes by name: all but ``without`` and ``**options``."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in named and p.name not in without]


def check_names(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that there are not.

    Args:
        what: who is given them, for the message.
        given: their names.
        known: all options that the caller may give, so that the nearest is the one that was meant.

    Raises:
        OptionError: one of them is not known; the message has the nearest name and all there are.
    """
    for name in given:
        if name not in known:
            raise OptionError(
                f"{what} has no option {name!r}.{nearest(name, known)} Its options: {', '.join(known)}."
            )


@dataclass(frozen=True)
class SolveSettings:
    """Solver, adjoint and stopping rule of a span; see :func:`twnn_plugin.fix` for each.

    Attributes:
        solver: registered name or instance.
        adjoint: registered name or instance.
        tol: tolerance of the residual.
        max_iter: replays per row at most.
        stop: ``"rel"`` or ``"abs"``.
        norm: ``"l2"`` or ``"max"``.
    """

    solver: str | Solver = "anderson"
    adjoint: str | Adjoint = "implicit"
    tol: float = 1e-3
    max_iter: int = 30
    stop: str = "rel"
    norm: str = "l2"
    control: Control = field(init=False, repr=False, compare=False)
    made: tuple[Solver, Adjoint] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "control", check_control(self.tol, self.max_iter, self.stop, self.norm))
        made = solvers.registry.resolve(self.solver), adjoints.registry.resolve(self.adjoint)
        object.__setattr__(self, "made", made)

    @classmethod
    def names(cls) -> list[str]:
        """The options there are."""
        return [f.name for f in fields(cls) if f.init]

    def changed(self, **options: Any) -> SolveSettings:
        """A copy with some options changed.

        Raises:
            OptionError: no such option, or a value out of range.
        """
        check_names("A span", options, self.names())
        return replace(self, **options)
