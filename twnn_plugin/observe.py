"""Watching solves: observers that plugins bring, and two that are ready to use.

``fix`` asks :func:`listeners` once per solve. While no plugin implements an observer hook the answer is
an empty tuple and nothing else happens: no call into pluggy, no object made.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TextIO

import torch
from torch import Tensor

from .errors import OptionError, PluginWarning
from .hookspecs import hookimpl
from .solvers import Control
from .trees import rebuild
from .types import Iteration, Solution

__all__ = [
    "Listener",
    "Progress",
    "SolveInfo",
    "SolveTrace",
    "Trace",
    "Watch",
    "listeners",
    "set_listeners",
    "watch",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SolveInfo:
    """What is known of a solve before it starts.

    Attributes:
        number: counts the solves of the process that were watched; tells nested solves apart.
        rows: samples in the batch, B.
        size: numbers in the state of a sample, D.
        dtype: what the solver computes in.
        device: where.
        solver: class of the solver.
        adjoint: class of the adjoint.
        tol: the tolerance.
        max_iter: evaluations per row at most.
        stop: ``"rel"`` or ``"abs"``.
        norm: ``"l2"`` or ``"max"``.
        coupled: whether rows influence each other.
    """

    number: int
    rows: int
    size: int
    dtype: torch.dtype
    device: torch.device
    solver: str
    adjoint: str
    tol: float
    max_iter: int
    stop: str
    norm: str
    coupled: bool


@dataclass(frozen=True)
class Listener:
    """One plugin's observer hooks, each taking keyword arguments; ``None`` where it has none."""

    name: str
    iteration: Callable[..., object] | None = None
    solve: Callable[..., object] | None = None


_listeners: tuple[Listener, ...] = ()
_warned: set[str] = set()
_numbers = itertools.count(1)


def listeners() -> tuple[Listener, ...]:
    """Who listens now; empty while nobody does."""
    return _listeners


def set_listeners(found: Iterable[Listener]) -> None:
    """Replace the listeners; the plugin host calls this whenever a plugin comes or goes."""
    global _listeners
    _listeners = tuple(found)
    _warned.intersection_update(listener.name for listener in _listeners)


class Watch:
    """One solve as the listeners see it.

    Args:
        info: what is known of the solve before it starts.
        heard: who listens.
        callback: the caller's own, called first. What it raises is the caller's and ends the solve.
    """

    def __init__(
        self,
        info: SolveInfo,
        heard: tuple[Listener, ...],
        callback: Callable[[Iteration], None] | None = None,
    ):
        self.info = info
        self._own = callback
        self._iteration = [(one.name, one.iteration) for one in heard if one.iteration is not None]
        self._solve = [(one.name, one.solve) for one in heard if one.solve is not None]

    @property
    def callback(self) -> Callable[[Iteration], None] | None:
        """What the solver is to call after each evaluation: the caller's own if no listener wants more."""
        return self._tell if self._iteration else self._own

    def _tell(self, iteration: Iteration) -> None:
        if self._own is not None:
            self._own(iteration)
        for name, hear in self._iteration:
            _guarded(name, hear, iteration=iteration, info=self.info)

    def finished(self, solution: Solution) -> None:
        """Tell the listeners what came of the solve."""
        for name, hear in self._solve:
            _guarded(name, hear, solution=solution, info=self.info)


def watch(control: Control, start: Tensor, solver: object, adjoint: object) -> Watch:
    """Announce a solve to the present listeners.

    Args:
        control: its stopping rule, with the caller's callback if there is one.
        start: (B, D) the starting state as a matrix.
        solver: instance.
        adjoint: instance.
    """
    info = SolveInfo(
        number=next(_numbers),
        rows=start.shape[0],
        size=start.shape[1],
        dtype=start.dtype,
        device=start.device,
        solver=type(solver).__name__,
        adjoint=type(adjoint).__name__,
        tol=control.tol,
        max_iter=control.max_iter,
        stop=control.stop,
        norm=control.norm,
        coupled=control.coupled,
    )
    return Watch(info, _listeners, control.callback)


def _guarded(name: str, hear: Callable[..., object], **what: object) -> None:
    """Call an observer; if it breaks, say so once and go on: watching must not cost the solve."""
    try:
        hear(**what)
    except Exception as error:
        _log.debug("observer %r failed", name, exc_info=error)
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"The observer of plugin {name!r} raised {type(error).__name__}: {error}. The solve goes on; "
                f"later failures of this plugin are only logged. Fix it, or take it out with "
                f"tw.unregister_plugin({name!r}).",
                PluginWarning,
                stacklevel=3,
            )


@dataclass
class SolveTrace:
    """What :class:`Trace` recorded of one solve. K is the number of times the solver reported.

    Attributes:
        info: what is known of the solve; ``None`` if the trace was used as a callback.
        solution: status, steps and residual of the rows, its state detached; ``None`` while the solve
            runs, or if the trace was used as a callback.
    """

    info: SolveInfo | None = None
    solution: Solution | None = None
    _seen: list[tuple[int, int, Tensor, Tensor, Tensor | None]] = field(default_factory=list, repr=False)

    @property
    def steps(self) -> Tensor:
        """(K,) evaluations of ``f`` per row at each report."""
        return torch.tensor([step for step, *_ in self._seen], dtype=torch.long, device="cpu")

    @property
    def evaluations(self) -> Tensor:
        """(K,) rows evaluated in all up to each report."""
        return torch.tensor([count for _, count, *_ in self._seen], dtype=torch.long, device="cpu")

    @property
    def residual(self) -> Tensor:
        """(B, K) residuals as ``stop`` and ``norm`` measure them; NaN once a row is finished."""
        return self._table([(rows, residual) for _, _, rows, residual, _ in self._seen], ())

    @property
    def iterates(self) -> Tensor:
        """(B, K, D) flattened states; NaN once a row is finished. Needs ``Trace(iterates=True)``."""
        kept = [(rows, value) for _, _, rows, _, value in self._seen if value is not None]
        if len(kept) < len(self._seen):
            raise OptionError("The iterates were not recorded: make the trace as Trace(iterates=True).")
        return self._table(kept, tuple(kept[0][1].shape[1:]) if kept else (0,))

    def _table(self, columns: list[tuple[Tensor, Tensor]], tail: tuple[int, ...]) -> Tensor:
        if not columns:
            rows = self.info.rows if self.info is not None else 0
            return torch.empty(rows, 0, *tail, device="cpu")
        highest = max((int(rows.max()) + 1 for rows, _ in columns if rows.numel()), default=0)
        # Under vmap a solver sees the rows of all instances, more than the solve was announced with.
        batch = highest if self.info is None else max(self.info.rows, highest)
        table = columns[0][1].new_full((batch, len(columns), *tail), float("nan"))
        for k, (rows, values) in enumerate(columns):
            table[rows, k] = values
        return table


class Trace:
    """Records residuals, and iterates if asked, of the newest solves.

    Use it as a callback, ``tw.fix(..., callback=trace)``, or as a plugin that hears every solve of the
    process, those inside models too: ``tw.register_plugin(trace, "trace")``. Tensors are copied to
    the CPU, so on a GPU each report waits for the device.

    Args:
        iterates: record the states, too: (B, D) values at every step.
        keep: how many of the newest solves to keep, >= 1.

    Attributes:
        solves: a :class:`SolveTrace` each, newest last.

    Raises:
        OptionError: ``keep`` is not a whole number >= 1, or ``iterates`` neither True nor False.
    """

    def __init__(self, iterates: bool = False, keep: int = 1):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise OptionError(f"Option keep of Trace must be a whole number, at least 1; got {keep!r}.")
        if not isinstance(iterates, bool):
            raise OptionError(f"Option iterates of Trace must be True or False; got {iterates!r}.")
        self.iterates_kept = iterates
        self.keep = keep
        self.solves: list[SolveTrace] = []

    @property
    def newest(self) -> SolveTrace:
        """The newest solve's trace; empty if there was none."""
        return self.solves[-1] if self.solves else SolveTrace()

    @property
    def residual(self) -> Tensor:
        """(B, K) of the newest solve, see :attr:`SolveTrace.residual`."""
        return self.newest.residual

    def clear(self) -> None:
        """Forget every solve."""
        self.solves.clear()

    def __call__(self, iteration: Iteration) -> None:
        """Record one report: the trace as a callback. A first step starts a new solve."""
        newest = self.solves[-1] if self.solves else None
        goes_on = newest is not None and newest._seen and iteration.step > newest._seen[-1][0]
        self._record(newest if goes_on and newest is not None else self._start(None), iteration)

    @hookimpl
    def twnn_observe_iteration(self, iteration: Iteration, info: SolveInfo) -> None:
        """Record one report: the trace as a plugin."""
        self._record(self._of(info), iteration)

    @hookimpl
    def twnn_observe_solve(self, solution: Solution, info: SolveInfo) -> None:
        """Record what came of the solve, without the graph that its state hangs on."""
        self._of(info).solution = replace(solution, value=rebuild(solution.value, Tensor.detach))

    def _of(self, info: SolveInfo) -> SolveTrace:
        known = (one for one in reversed(self.solves) if one.info is not None)
        return next((one for one in known if one.info == info), None) or self._start(info)

    def _start(self, info: SolveInfo | None) -> SolveTrace:
        self.solves.append(SolveTrace(info))
        del self.solves[: -self.keep]
        return self.solves[-1]

    def _record(self, solve: SolveTrace, iteration: Iteration) -> None:
        value = iteration.value.detach().cpu().clone() if self.iterates_kept else None
        rows, residual = iteration.rows.cpu(), iteration.residual.detach().cpu()
        solve._seen.append((iteration.step, iteration.evaluations, rows.clone(), residual.clone(), value))


class Progress:
    """Writes a line of text about a running solve to a stream.

    Use it as a callback or as a plugin, like :class:`Trace`; as a plugin it writes a line at the end of
    each solve, too. Each line reads numbers from the device.

    Args:
        every: steps between lines, >= 1; the first step always gets one.
        stream: where to; by default what ``sys.stderr`` is when the line is written.

    Raises:
        OptionError: ``every`` is not a whole number >= 1.
    """

    def __init__(self, every: int = 10, stream: TextIO | None = None):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OptionError(f"Option every of Progress must be a whole number, at least 1; got {every!r}.")
        self.every = every
        self.stream = stream

    def __call__(self, iteration: Iteration) -> None:
        """Write a line if one is due: the progress as a callback."""
        if iteration.step == 1 or iteration.step % self.every == 0:
            self._write(self._line(iteration))

    @hookimpl
    def twnn_observe_iteration(self, iteration: Iteration, info: SolveInfo) -> None:
        """Write a line if one is due: the progress as a plugin."""
        if iteration.step == 1 or iteration.step % self.every == 0:
            self._write(f"solve {info.number}, {self._line(iteration)} (tol {info.tol:.1e})")

    @hookimpl
    def twnn_observe_solve(self, solution: Solution, info: SolveInfo) -> None:
        """Write what came of the solve."""
        good = int(solution.converged.sum())
        done = f"solve {info.number} done: {good}/{info.rows} rows converged"
        self._write(f"{done}, {solution.evaluations} rows evaluated")

    @staticmethod
    def _line(iteration: Iteration) -> str:
        count = iteration.rows.numel()
        if not count:
            return f"step {iteration.step}: no row left"
        worst = float(iteration.residual.max())
        middle = float(iteration.residual.median())
        return (
            f"step {iteration.step}: {count} rows left, residual median {middle:.1e}, largest {worst:.1e}, "
            f"{iteration.evaluations} rows evaluated"
        )

    def _write(self, line: str) -> None:
        print(line, file=self.stream if self.stream is not None else sys.stderr, flush=True)
