"""The scheduler: passes that halt where they solve, and the pools that solve for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..adjoints.equation import Equation
from ..backbones.manage import report as wormhole_report
from ..backbones.span import AttachedSpan
from ..blocks import SpanRecord
from ..blocks.wormhole import Wormhole
from ..errors import OptionError
from ..solvers.base import Control, Outcome, Problem, Solver, StepSolver
from ..solvers.hosting import hosted
from .lanes import Cancelled, Lane
from .modes import Modes
from .pool import Pool
from .report import StreamReport, joined
from .request import Request

__all__ = ["Engine"]

Ordinary = Callable[[Solver, Problem, Tensor, Control], Outcome]


@dataclass(eq=False)
class _Pass:
    """One pass of the model over one batch."""

    number: int
    images: Tensor
    rest: Any
    lane: Lane | None = None
    request: Request | None = None  # the solve that it has halted for
    output: Any = None
    error: BaseException | None = None
    records: dict[int, SpanRecord] = field(default_factory=dict)  # by the place of the wormhole


class _Halting:
    """The host of one pass: keeps its solves until the pool has an outcome."""

    def __init__(self, engine: Engine, work: _Pass):
        self.engine, self.work = engine, work

    def solve(
        self, solver: Solver, problem: Problem, z: Tensor, control: Control, ordinary: Ordinary
    ) -> Outcome:
        reason = self.engine.refusal(solver, problem, control)
        if reason:
            alone = self.engine.report.alone
            alone[reason] = alone.get(reason, 0) + 1
            with hosted(None):
                return ordinary(solver, problem, z, control)
        assert isinstance(solver, StepSolver) and isinstance(problem, Equation)
        assert self.work.lane is not None
        request = Request(solver, problem, z, control, Modes.present(), self.work.number)
        self.work.request = request
        self.work.lane.halt()
        assert request.outcome is not None
        return request.outcome


class Engine:
    """Runs passes, one thread at a time, so that the active batches of their solves are full.

    Args:
        model: in eval mode.
        batches: of (images, what is passed through).
        capacity: rows in an active batch; None: as many as the first batch has.
        in_flight: passes under way, or waiting for their turn to be put out, at most.
        records: whether the report keeps what is known of every sample.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterator[tuple[Tensor, Any]],
        capacity: int | None,
        in_flight: int,
        records: bool,
    ):
        self.model, self.batches, self.in_flight = model, batches, in_flight
        self.capacity, self.keep_records = capacity, records
        self.report = StreamReport()
        self._modes: Modes | None = None
        self._spans = [m for m in model.modules() if isinstance(m, AttachedSpan)]
        held = [m for m in model.modules() if isinstance(m, (AttachedSpan, Wormhole))]
        self._wormholes = [m.feedback for m in held]
        self._seen: list[SpanRecord | None] = []
        self._history: list[list[SpanRecord]] = [[] for _ in self._wormholes]
        self._uncounted = set(range(len(self._wormholes)))  # whose multiply-adds are not known
        self._line: deque[_Pass] = deque()  # in the order of the batches
        self._exhausted = False
        self._lanes: list[Lane] = []
        self._idle: list[Lane] = []
        self._pools: list[Pool] = []

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        """What the model returns for each batch, and what was passed through, in order."""
        self._modes = Modes.present()  # those in force when the iteration begins hold for all of it
        try:
            while True:
                head = self._line[0] if self._line else None
                if head is not None and head.lane is None:
                    self._line.popleft()
                    if head.error is not None:
                        raise head.error
                    self._note(head)
                    yield head.output, head.rest
                elif head is None and self._exhausted:
                    return
                else:
                    self._advance()
        finally:
            self.close()

    def close(self) -> None:
        """End every pass that is under way, and its thread."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()
        self._line.clear()
        self._pools.clear()
        self._exhausted = True

    def refusal(self, solver: Solver, problem: Problem, control: Control) -> str:
        """Why the rows of a solve cannot share a batch with others; empty: they can."""
        if not isinstance(solver, StepSolver):
            return f"{type(solver).__name__} runs its own loop"
        if not isinstance(problem, Equation) or not problem.can_leave:
            return "no context, so that rows cannot be told apart"
        if control.coupled:
            return "coupled rows"
        if control.callback is not None:
            return "an observer or a callback watches every iteration"
        if control.cuda_graphs:
            return "cuda_graphs"
        if control.scale is not None or torch.is_grad_enabled() or transforms.active():
            return "derivatives are recorded"
        if any(span.group.busy() for span in self._spans):
            return "inside another wormhole's span"
        return ""

    # One thing after the other.

    def _advance(self) -> None:
        """Begin a pass, or evaluate an active batch and go on with the passes that this completes."""
        pool = max(self._pools, key=_priority) if len(self._pools) > 1 else next(iter(self._pools), None)
        full = pool is not None and pool.active + pool.waiting >= pool.capacity
        more = not self._exhausted and len(self._line) < self.in_flight
        if more and not full:
            self._begin()
            return
        assert pool is not None
        before, fill = pool.rows_evaluated, list[int]()
        try:
            complete = pool.advance(fill, until_any=more or len(self._pools) > 1)
        finally:
            self.report.evaluations += len(fill)
            self.report.rows += pool.rows_evaluated - before
            self.report.alive += sum(fill)
            if self.keep_records:
                self.report.fill += fill
        if not pool.active and not pool.waiting:
            self._pools.remove(pool)
        for request in complete:
            work = next(work for work in self._line if work.request is request)
            work.request = None
            self._go_on(work)

    def _begin(self) -> None:
        """Start the next batch; a batch that cannot be had is an error that waits for its turn."""
        work = _Pass(self.report.batches + len(self._line), torch.empty(0, device="cpu"), None)
        try:
            work.images, work.rest = next(self.batches)
        except StopIteration:
            self._exhausted = True
            return
        except Exception as error:
            work.error, self._exhausted = error, True
            self._line.append(work)
            return
        if self.model.training:
            work.error, self._exhausted = OptionError(_TRAINING), True
            self._line.append(work)
            return
        if self.capacity is None:
            self.capacity = max(1, work.images.shape[0])
        self.report.capacity = self.capacity
        self._line.append(work)
        self.report.peak_in_flight = max(self.report.peak_in_flight, len(self._line))
        if self._idle:
            work.lane = self._idle.pop()
        else:
            work.lane = Lane(f"twnn-stream-{len(self._lanes)}")
            self._lanes.append(work.lane)
        self._go_on(work, start=True)

    def _go_on(self, work: _Pass, start: bool = False) -> None:
        """Let a pass run until it halts or ends."""
        lane = work.lane
        assert lane is not None
        for place, record in work.records.items():  # what it finds there is its own
            self._wormholes[place].last = record
        self._seen = [wormhole.last for wormhole in self._wormholes]
        if start:
            lane.start(lambda: self._run(work))
        else:
            lane.resume()
        # Only this pass has run: what records have come are its own.
        for place, (wormhole, before) in enumerate(zip(self._wormholes, self._seen, strict=True)):
            if wormhole.last is not before and wormhole.last is not None:
                work.records[place] = wormhole.last
        if lane.halted:
            assert work.request is not None
            self._enqueue(work.request)
            return
        work.lane = None
        self._idle.append(lane)
        self._count(work)

    def _run(self, work: _Pass) -> None:
        """A pass, in its thread."""
        assert self._modes is not None
        try:
            with self._modes.entered(), hosted(_Halting(self, work)):
                work.output = self.model(work.images)
        except Cancelled:
            pass
        except BaseException as error:
            work.error = error

    def _enqueue(self, request: Request) -> None:
        assert self.capacity is not None
        self.report.solves += 1
        for pool in self._pools:
            if pool.accepts(request):
                self.report.shared += 2 if pool.lonely else 1
                pool.lonely = False
                pool.add(request)
                return
        pool = Pool(request, self.capacity)
        pool.add(request)
        self._pools.append(pool)

    # What is reported.

    def _count(self, work: _Pass) -> None:
        """Count the multiply-adds of wormholes that have run for the first time."""
        fresh = [
            place
            for place, record in work.records.items()
            if place in self._uncounted and record.evaluations and record is self._wormholes[place].last
        ]
        if fresh and work.error is None and self._modes is not None:
            with self._modes.entered():
                wormhole_report(self.model)  # notes them in the records
            self._uncounted.difference_update(fresh)

    def _note(self, work: _Pass) -> None:
        self.report.batches += 1
        self.report.samples += work.images.shape[0]
        if not self.keep_records:
            return
        for place, record in work.records.items():
            self._history[place].append(record)

    def summary(self) -> StreamReport:
        """The report so far."""
        self.report.spans[:] = [joined(history) for history in self._history if history]
        return self.report


_TRAINING = (
    "The model of a stream must stay in eval mode until the stream ends; it was put into training mode. "
    "Close the stream first."
)


def _priority(pool: Pool) -> tuple[int, int]:
    """The fullest first; among these the one that the oldest pass waits for."""
    return min(pool.active + pool.waiting, pool.capacity), -pool.oldest
