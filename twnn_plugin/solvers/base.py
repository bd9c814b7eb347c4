"""What a solver is: a whole solver, or the step of one whose loop the driver owns."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..errors import MapError, OptionError
from ..trees import take
from ..types import Iteration

__all__ = [
    "Control",
    "Outcome",
    "Problem",
    "Rounding",
    "Solver",
    "StepSolver",
    "WholeSolver",
    "check_place",
    "check_whole",
    "is_number",
]


class Problem(Protocol):
    """The equation ``z = f(z)`` for the rows that are still being solved.

    Attributes:
        size: rows now in the batch, b.
        evaluations: rows evaluated so far in all.
        can_leave: whether rows may leave the batch (their context can be gathered).
        leave_share: rows leave when the share of unfinished rows falls below this.
    """

    size: int
    evaluations: int
    can_leave: bool
    leave_share: float

    def evaluate(self, z: Tensor) -> Tensor:
        """``f`` on a (b, D) matrix of states; counted in ``evaluations``."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices into the present batch) only."""
        ...


class Rounding(Protocol):
    """What half precision makes of states."""

    def rounded(self, matrix: Tensor) -> Tensor:
        """Of a (b, D) matrix."""
        ...


@dataclass(frozen=True)
class Control:
    """When a row is finished.

    Attributes:
        tol: tolerance, > 0.
        max_iter: evaluations of ``f`` per row at most, >= 1.
        stop: ``"rel"`` (against ``||f(z)||``) or ``"abs"``.
        norm: ``"l2"`` or ``"max"`` (largest change at any position, against the rms state).
        scale: (B,) what the tolerance is relative to, instead of ``||f(z)||``; used by adjoints.
        coupled: rows influence each other, so all of them finish together.
        callback: called after every evaluation with an :class:`~twnn_plugin.types.Iteration`.
        parts: widths of parts of the state that must each meet the tolerance; () for the whole.
        check_every: evaluations between two looks of the host at which rows are done, >= 1; None: 1 on
            the CPU, 5 on an accelerator. Statuses, steps, residuals and values do not depend on it; rows
            are evaluated for at most that many steps in vain.
        cuda_graphs: capture the evaluations between two looks in CUDA graphs and replay them. ``f`` must
            be capturable: no host synchronisation, no shapes that depend on values.
        seen: makes of a (b, D) matrix of states what ``f`` sees of it, where that is in half precision: the
            residual is that of the state which is given back. None: ``f`` sees it as it is.
        coarse: rounding error of an evaluation in half precision, relative; 0: it is that of the matrix.
    """

    tol: float
    max_iter: int
    stop: str = "rel"
    norm: str = "l2"
    scale: Tensor | None = None
    coupled: bool = False
    callback: Callable[[Iteration], None] | None = None
    parts: tuple[int, ...] = ()
    check_every: int | None = None
    cuda_graphs: bool = False
    seen: Rounding | None = None
    coarse: float = 0.0

    def __post_init__(self) -> None:
        if 0 in self.parts:  # nothing to settle there, and no largest entry
            object.__setattr__(self, "parts", tuple(width for width in self.parts if width))
        every = self.check_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise OptionError(f"check_every must be a whole number, at least 1, or None; got {every!r}.")
        if self.callback is not None and ((every or 1) > 1 or self.cuda_graphs):
            raise OptionError(
                "A callback looks at every evaluation, so check_every must be 1 and cuda_graphs off; got "
                f"check_every={every!r}, cuda_graphs={self.cuda_graphs!r}."
            )


@dataclass
class Outcome:
    """A solve's result over the whole batch: value (B, D); status, steps, residual (B,)."""

    value: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor


def is_number(value: object) -> bool:
    """Whether it is an int that a float can hold or a float, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def check_place(fz: Tensor, z: Tensor) -> None:
    """Raise :class:`~twnn_plugin.errors.MapError` unless ``f(z)`` can be compared with the states ``z``.

    To be called with the first value in a solve: a map that has kept the device once keeps it.
    """
    if fz.device != z.device or fz.layout is not z.layout:
        raise MapError(
            f"f must return a dense state on the device of z0, {z.device}; it returned {fz.layout} on "
            f"{fz.device}. Move what f closes over, such as its parameters, to that device."
        )


def check_whole(solver: str, option: str, value: object, least: int = 1) -> None:
    """Raise :class:`~twnn_plugin.errors.OptionError` unless ``value`` is a whole number >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(
            f"Option {option} of solver {solver!r} must be a whole number, at least {least}; got {value!r}."
        )


class Solver(ABC):  # noqa: B024
    """A way to solve ``z = f(z)``; derive from :class:`StepSolver` or :class:`WholeSolver`."""


class StepSolver(Solver):
    """A method given by its step; the driver owns the loop, the tests and the bookkeeping.

    Write it as a frozen dataclass whose fields are its options. ``init`` and ``step`` work on
    matrices: one row a sample, all rows independent of each other.

    Attributes:
        keeps_residual: whether ``step`` may hold on to ``r`` in the state or iterate that it returns.
            If not, the driver writes every residual to the same memory.
    """

    keeps_residual: ClassVar[bool] = True

    def init(self, z: Tensor) -> Any:
        """The method's own state at the start, from the (b, D) matrix ``z``.

        Any nesting of tuples, lists and dicts of tensors whose first axis is the batch (the driver
        gathers them when rows leave) and of plain Python values (left alone).
        """
        return None

    def renew(self, state: Any, rows: Tensor, z: Tensor) -> Any:
        """The method's own state where some rows start anew, as :meth:`init` lets them, and the others go on.

        Optional: without it, rows that join others in a stream are stepped apart from these until their
        states have the same structure. A class that overrides ``init`` or ``step`` needs one of its own.

        Args:
            state: what ``init``, ``step`` or ``renew`` returned. What it holds of these rows means nothing,
                and need not be finite.
            rows: (n,) places in the batch.
            z: (b, D) the iterates, with the starting states of these rows in their places.
        """
        # Not abstract: a solver may do without, and who asks for it looks at ``renews`` first.
        raise NotImplementedError(f"{type(self).__name__} has no renew; see its property renews.")

    @property
    def renews(self) -> bool:
        """Whether :meth:`renew` is there and belongs to this ``init`` and ``step``."""
        order = type(self).__mro__
        places = {
            name: next(i for i, kind in enumerate(order) if name in vars(kind))
            for name in ("init", "step", "renew")
        }
        renew = places.pop("renew")
        return order[renew] is not StepSolver and renew <= min(places.values())

    def in_parts(self, parts: tuple[int, ...]) -> StepSolver:
        """The method for states of several parts, of the given widths, that may differ in units and size."""
        return self

    def keep(self, state: Any, rows: Tensor) -> Any:
        """The method's own state for some rows alone: (n,) places in the batch, ascending.

        What ``state`` holds is not used again.
        """
        return take(state, rows)

    def compiled(self) -> StepSolver:
        """The method by compiled kernels (:mod:`twnn_plugin.kernels`), if it has any; equal up to rounding.

        Asked for where the states of a solve can be given to them.
        """
        return self

    @abstractmethod
    def step(self, problem: Problem, z: Tensor, fz: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next iterate.

        Args:
            problem: for methods that need further evaluations of ``f`` in a step.
            z: (b, D) the present iterate.
            fz: (b, D) ``f(z)``.
            r: (b, D) ``f(z) - z``.
            state: what ``init`` or the last ``step`` returned.

        Returns:
            The next (b, D) iterate and the method's new state.
        """


class WholeSolver(Solver):
    """A method that runs its own loop, such as another library's."""

    @abstractmethod
    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        """Solve from the (B, D) matrix ``z``; statuses must come from a measured residual."""
