"""torchdeq's solvers inside ``fix``, and ours inside ``torchdeq.get_deq``, by name.

torchdeq's loops stop when the worst row of the batch meets the tolerance, return another state than
the one whose residual they measured, and let one NaN row run all others to ``max_iter``. Here they
are steered through the function they are given: it measures every state they propose, row by row, by
the rule of all our solvers, takes a row's state when that row is done, and ends the loop when all are.
What torchdeq decides is which state comes next.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchdeq.solver import get_solver, register_solver, solver_stat_from_final_step

from ..errors import ConvergenceWarning, OptionError, nearest
from ..state import Layout
from ..types import Iteration, State, Status
from . import registry
from .base import Control, Outcome, Problem, WholeSolver, check_place, is_number
from .book import Book
from .driver import solve
from .inplace import differentiable
from .measure import EPS

__all__ = [
    "SOLVERS",
    "TorchdeqAnderson",
    "TorchdeqBroyden",
    "TorchdeqFixedPointIter",
    "TorchdeqSimpleFixedPointIter",
    "register_with_torchdeq",
]

PREFIX = "torchdeq."
"""Of the names of torchdeq's solvers here."""
OURS = "twnn."
"""Of the names of our solvers in torchdeq."""


# torchdeq's solvers for us ------------------------------------------------------------------------


class _Finished(Exception):
    """Leaves torchdeq's loop when no row is left to solve."""


def _shown_copies(callback: Callable[[Iteration], None]) -> Callable[[Iteration], None]:
    """A callback for states that are views of a buffer that torchdeq goes on writing to."""
    return lambda seen: callback(replace(seen, value=seen.value.clone()))


class _Steering:
    """``f`` as torchdeq calls it, on the whole (B, D) matrix.

    A finished row is handed back unchanged: its residual is zero from then on, so that nothing it
    does later can overflow torchdeq's history.
    """

    def __init__(self, problem: Problem, z: Tensor, control: Control):
        if control.callback is not None:
            control = replace(control, callback=_shown_copies(control.callback))
        self.problem = problem
        self.plain: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.control = control
        self.book = Book(z, control)
        self.start: Tensor | None = z
        self.rows: Tensor | None = None  # rows evaluated, once some have left
        self.step = 0
        self.fz = z

    def safe_start(self) -> Tensor:
        """The starting state with zeros in non-finite rows; they are evaluated as they were given."""
        assert self.start is not None
        finite = torch.isfinite(self.start).all(dim=1, keepdim=True)
        return self.start if bool(finite.all()) else torch.where(finite, self.start, 0.0)

    def __call__(self, x: Tensor, tau: float = 1.0) -> Tensor:
        self.step += 1
        if torch.is_grad_enabled():
            x = x.clone()  # a view of a buffer that torchdeq goes on writing to
        z = x if self.rows is None else x[self.rows]
        if self.start is not None:
            z, self.start = self.start, None
        with self.plain():
            self.fz = fz = self.problem.evaluate(z)
        if self.step == 1:
            check_place(fz, z)
        leaving = self.book.look(self.step, z, fz, fz - z, self.problem)
        if leaving is not None:
            self.book.finish(leaving, self.step, z, fz)
        if self.step == self.control.max_iter and self.book.unfinished:
            self.book.exhaust(fz)
        if not self.book.unfinished:
            raise _Finished
        if self.book.alive is not None:
            present = x if self.rows is None else x[self.rows]
            fz = torch.where(self.book.alive[:, None], fz, present)
        full = fz if self.rows is None else x.index_copy(0, self.rows, fz)
        if leaving is not None:
            self._let_go()
        return full if tau == 1 else tau * full + (1 - tau) * x

    def _let_go(self) -> None:
        problem = self.problem
        if not problem.can_leave or self.control.coupled:
            return
        if self.book.unfinished < problem.leave_share * problem.size:
            problem.keep(self.book.compact())
            self.rows = self.book.rows

    def break_down(self) -> Outcome:
        """The outcome when torchdeq could not go on: unfinished rows stagnated at the last state."""
        book = self.book
        rows = book.rows if book.alive is None else book.rows[book.alive]
        book.exhaust(self.fz)
        book.status[rows] = int(Status.stagnated)
        book.steps[rows] = self.step
        return book.outcome()


@dataclass(frozen=True)
class _Torchdeq(WholeSolver):
    """A solver of torchdeq; the fields are torchdeq's own options."""

    key: ClassVar[str]

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        steering = _Steering(problem, z, control)
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        with contextlib.suppress(_Finished), differentiable() as plain:
            steering.plain = plain
            try:
                # tol=0: the steering function ends the loop, torchdeq's batch-wide test never does.
                get_solver(self.key)(
                    steering, steering.safe_start(), max_iter=control.max_iter, tol=0.0, **options
                )
            except torch.linalg.LinAlgError as error:
                warnings.warn(self._breakdown(steering, error), ConvergenceWarning, stacklevel=2)
                return steering.break_down()
        return steering.book.outcome()

    def _breakdown(self, steering: _Steering, error: Exception) -> str:
        return (
            f"Solver '{PREFIX}{self.key}' cannot go on after {steering.step} evaluations: its linear "
            f"system is singular ({str(error).splitlines()[0]}). {steering.book.unfinished} row(s) are "
            "left where they were. Raise lam, or use solver='anderson', which solves no such system."
        )

    def _check(self, option: str, good: bool, expected: str) -> None:
        if not good:
            raise OptionError(
                f"Option {option} of solver '{PREFIX}{self.key}' must be {expected}; "
                f"got {getattr(self, option)!r:.40}."
            )


@dataclass(frozen=True)
class TorchdeqFixedPointIter(_Torchdeq):
    """torchdeq's damped fixed-point iteration.

    Args:
        tau: > 0, share of the residual that is added; 1 is plain iteration.
    """

    tau: float = 1.0

    key: ClassVar[str] = "fixed_point_iter"

    def __post_init__(self) -> None:
        self._check("tau", is_number(self.tau) and 0 < self.tau < math.inf, "a positive number")


@dataclass(frozen=True)
class TorchdeqSimpleFixedPointIter(_Torchdeq):
    """torchdeq's damped fixed-point iteration without its bookkeeping.

    In torchdeq it always runs to ``max_iter``; here it stops when every row has converged.

    Args:
        tau: > 0, share of the residual that is added; 1 is plain iteration.
    """

    tau: float = 1.0

    key: ClassVar[str] = "simple_fixed_point_iter"

    def __post_init__(self) -> None:
        self._check("tau", is_number(self.tau) and 0 < self.tau < math.inf, "a positive number")


@dataclass(frozen=True)
class TorchdeqAnderson(_Torchdeq):
    """torchdeq's Anderson acceleration, by regularised normal equations.

    The regulariser is absolute: where residuals are small against ``sqrt(lam)`` it slows the method
    down, down to slower than plain iteration.

    Args:
        m: states kept, >= 2 (torchdeq fails with an IndexError for 1).
        lam: > 0, added to the diagonal of the Gram matrix; with 0 a converged row would make the
            system of the whole batch singular.
        tau: > 0, mixing of ``f``'s values against the states.
    """

    m: int = 6
    lam: float = 1e-4
    tau: float = 1.0

    key: ClassVar[str] = "anderson"

    def __post_init__(self) -> None:
        self._check("m", isinstance(self.m, int) and self.m >= 2, "a whole number, at least 2")
        self._check("lam", is_number(self.lam) and 0 < self.lam < math.inf, "a positive number")
        self._check("tau", is_number(self.tau) and 0 < self.tau < math.inf, "a positive number")


@dataclass(frozen=True)
class TorchdeqBroyden(_Torchdeq):
    """torchdeq's Broyden's method, with or without a line search.

    Args:
        LBFGS_thres: updates kept, >= 1; ``None``: all, which takes memory for ``max_iter`` of them.
        ls: search along each step. The search looks at the whole batch, so that a row's result
            depends on the other rows, and costs further evaluations.
    """

    LBFGS_thres: int | None = None
    ls: bool = False

    key: ClassVar[str] = "broyden"

    def __post_init__(self) -> None:
        kept = self.LBFGS_thres
        good = kept is None or (isinstance(kept, int) and not isinstance(kept, bool) and kept >= 1)
        self._check("LBFGS_thres", good, "a whole number, at least 1, or None")
        self._check("ls", isinstance(self.ls, bool), "True or False")


SOLVERS: dict[str, Callable[..., WholeSolver]] = {
    PREFIX + cls.key: cls
    for cls in (TorchdeqFixedPointIter, TorchdeqSimpleFixedPointIter, TorchdeqAnderson, TorchdeqBroyden)
}
"""torchdeq's solvers by the names they have here."""


# Our solvers for torchdeq -------------------------------------------------------------------------


class _Traced:
    """torchdeq's function as a problem: no row leaves, since it closes over its input."""

    can_leave = False
    leave_share = 0.0

    def __init__(self, func: Callable[[Any], Any], layout: Layout, size: int, wanted: Sequence[int]):
        self.func = func
        self.layout = layout
        self.size = size
        self.evaluations = 0
        self.wanted = frozenset(wanted)
        self.states: dict[int, Tensor] = {}  # f(z) of the steps that were asked for
        self.fz: Tensor | None = None
        self.errors: Tensor | None = None  # (2, B) absolute and relative, of the last evaluation
        self.trace: list[Tensor] = []

    def evaluate(self, z: Tensor) -> Tensor:
        self.evaluations += self.size
        given = self.layout.unpack(z)
        fz = self.layout.pack(self.func(given), self.size)
        if fz.requires_grad and torch.is_grad_enabled():
            raise OptionError(
                "A solver inside torchdeq returns a state without a graph, so this derivative (a second "
                "one, if a backward pass was asked to create_graph) would be silently wrong. Call it "
                "under torch.no_grad(), or use twnn_plugin.fix, whose adjoint 'unrolled' has derivatives "
                "of any order."
            )
        change = torch.linalg.vector_norm(fz - z, dim=1)
        self.errors = torch.stack([change, change / (torch.linalg.vector_norm(fz, dim=1) + EPS)])
        self.fz = fz
        return fz

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("rows of a torchdeq function cannot leave")

    def look(self, iteration: Iteration) -> None:
        """Write down the errors of the rows that are not finished; the others keep theirs."""
        assert self.errors is not None and self.fz is not None
        newest = self.trace[-1].clone() if self.trace else self.errors.clone()
        newest[:, iteration.rows] = self.errors[:, iteration.rows]
        self.trace.append(newest)
        if iteration.step in self.wanted:
            self.states[iteration.step] = self.fz

    def trajectory(self, outcome: Outcome, wanted: Sequence[int]) -> list[State]:
        """The state after each wanted step; a row that is done by then has its final state."""
        out = []
        for step in wanted:
            value = outcome.value
            if step in self.states:
                early = (outcome.steps > step)[:, None]
                value = torch.where(early, self.states[step], value)
            out.append(self.layout.unpack(value))
        return out

    def info(self, outcome: Outcome) -> dict[str, Tensor]:
        """torchdeq's statistics, with our statuses as ``"status"``."""
        fz = outcome.value if self.fz is None else self.fz
        info = solver_stat_from_final_step(outcome.value, fz)
        info["nstep"] = outcome.steps.to(outcome.value.dtype)
        trace = self.trace or ([] if self.errors is None else [self.errors])
        if trace:
            absolute, relative = torch.stack(trace, dim=2)
            info.update(abs_trace=absolute, rel_trace=relative)
            info.update(abs_lowest=absolute[:, -1], rel_lowest=relative[:, -1])
        info["status"] = outcome.status
        return info


def _number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    """An option that torchdeq hands on as it was given, where it also multiplies it by a factor."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name} must be a finite number; got {value!r:.40}.") from None


_depth = threading.local()
_DEEPEST = 16  # solves inside each other; autograd changes threads at 60


@contextlib.contextmanager
def _nesting() -> Iterator[None]:
    """Ends what would go on for ever: with ``hook_ift=True`` torchdeq removes the wrong backward hook when
    a module was called twice, and each backward solve starts another one.
    """
    level = getattr(_depth, "level", 0)
    if level >= _DEEPEST:
        raise OptionError(
            f"{_DEEPEST} solves by '{OURS}...' were started inside each other. With hook_ift=True torchdeq "
            "never finishes the backward pass of a module that was called twice before it: use ift=True."
        )
    _depth.level = level + 1
    try:
        yield
    finally:
        _depth.level = level


@dataclass(frozen=True)
class _Exported:
    """The solver registered as ``name`` with the call that torchdeq makes."""

    name: str

    def __call__(
        self,
        func: Callable[[Any], Any],
        x0: Any,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Any, list[Any], dict[str, Tensor]]:
        """Solve ``x = func(x)`` as a solver of torchdeq does.

        Args:
            func: map of a state to a state; called with one argument.
            x0: (B, ...) or (B,) tensor, or a tuple or list of them.
            max_iter: evaluations at most.
            tol: tolerance, row by row.
            stop_mode: ``"abs"`` or ``"rel"``.
            indexing: steps, from 1, whose states are returned as well; a sequence, array or tensor of them.
            **options: of the solver.

        Returns:
            The state; the states after the steps in ``indexing``, one for each of them whenever the
            solve ended; a dict with ``abs_lowest``, ``rel_lowest``, ``nstep``, ``status`` (B,) of the
            returned state, ``abs_trace``, ``rel_trace`` (B, N) and ``sradius``.

        Raises:
            OptionError: an option is unknown or out of range, or a graph would be lost.
        """
        with _nesting():
            return self._solve(func, x0, max_iter, tol, stop_mode, indexing, options)

    def _solve(
        self,
        func: Callable[[Any], Any],
        x0: Any,
        max_iter: int,
        tol: float,
        stop_mode: str,
        indexing: Sequence[int] | None,
        options: dict[str, Any],
    ) -> tuple[Any, list[Any], dict[str, Tensor]]:
        if stop_mode not in ("abs", "rel"):
            hint = nearest(str(stop_mode), ("abs", "rel"))
            raise OptionError(f"stop_mode must be 'abs' or 'rel'; got {stop_mode!r}.{hint}")
        max_iter, tol = _number("max_iter", max_iter, int), _number("tol", tol, float)
        if max_iter < 1:
            raise OptionError(
                f"max_iter must be at least 1; got {max_iter!r}. (torchdeq's 'sliced' core divides "
                "f_max_iter by n_states: raise f_max_iter or lower n_states.)"
            )
        if not tol >= 0:
            raise OptionError(f"tol must not be negative or NaN; got {tol!r}.")
        solver = registry.make(self.name, **options)
        layout, start = Layout.of(x0, "x0")
        wanted = [int(step) for step in (() if indexing is None else indexing)]  # an array's items, too
        problem = _Traced(func, layout, start.shape[0], wanted)
        control = Control(tol, max_iter, stop_mode, callback=problem.look)
        outcome = solve(solver, problem, start, control)
        if bool((outcome.status != int(Status.converged)).any()):
            warnings.warn(
                f"Rows of a solve by '{OURS}{self.name}' inside torchdeq did not converge; info['status'] "
                "says which. Raise the max_iter or the tolerance of that solve.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return layout.unpack(outcome.value), problem.trajectory(outcome, wanted), problem.info(outcome)


def register_with_torchdeq() -> list[str]:
    """Make every native solver known to torchdeq as ``"twnn.<name>"``; the names, sorted.

    Call it again after further solvers were registered.
    """
    names = [name for name in registry.names() if not name.startswith(PREFIX)]
    for name in names:
        register_solver(OURS + name, _Exported(name))
    return [OURS + name for name in names]
