"""CUDA graphs of a few masked evaluations, replayed while their shapes recur."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import MapError, OptionError
from ..trees import leaves, rebuild
from .base import Problem
from .masked import Body, Carry

__all__ = ["Capture", "CudaCapture", "Graphs", "Rerun"]

_MOST = 32  # different bodies of one batch size; a method that has more never comes back to one

Signature = tuple[Any, ...]


class Capture(Protocol):
    """Work on fixed memory that is recorded once and repeated."""

    def warm_up(self, work: Callable[[], Carry]) -> Carry:
        """Do the work once, before anything like it is recorded."""
        ...

    def record(self, work: Callable[[], None]) -> None:
        """Take the work down; whether it is done in passing is open."""
        ...

    def replay(self) -> None:
        """Do the work that was recorded, on what its memory holds now."""
        ...


class CudaCapture:
    """A :class:`Capture` by a CUDA graph, on the device that is the current one when it is made.

    Not by ``torch.cuda.graph``, which waits for the device and empties torch's cache of memory before each
    capture, and leaves a stream of its own current where one fails. An operation that would wait for the
    device is refused by torch before CUDA hears of it: a capture that CUDA has called off cannot be ended by
    every torch in such a way that others can follow. That switch is one for the process: what another
    thread waits for in these milliseconds is refused as well.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._side = _side()

    def warm_up(self, work: Callable[[], Carry]) -> Carry:
        # On a stream of its own, as torch asks for: libraries allocate their workspaces here.
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            done = work()
        main.wait_stream(self._side)
        return done

    def record(self, work: Callable[[], None]) -> None:
        self._side.wait_stream(torch.cuda.current_stream())
        before = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(self._side):
                # Another thread, which pins memory, say, may go on meanwhile.
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    _sync_debug_mode("error")
                    work()
                finally:
                    _sync_debug_mode(before)
                    self._graph.capture_end()
        except RuntimeError as error:
            first = _first_of(error)
            raise MapError(
                f"f or the solver cannot be captured in a CUDA graph: {str(first).splitlines()[0]}. Inside "
                "them nothing may wait for the device (.item(), .cpu(), bool() of a tensor, boolean "
                "indexing) or depend on values in its shapes. Change that, or leave cuda_graphs out."
            ) from first

    def replay(self) -> None:
        self._graph.replay()


_sides = threading.local()


def _side() -> Any:
    """The stream of this thread that captures are made on, one for each device.

    cuBLAS keeps a workspace for every stream that it has seen, so that there must not be many.
    """
    found = vars(_sides).setdefault("by_device", {})
    device = torch.cuda.current_device()
    if device not in found:
        found[device] = torch.cuda.Stream()
    return found[device]


def _sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def _first_of(error: BaseException) -> BaseException:
    """What went wrong, where ending the capture failed because of it."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


class Rerun:
    """A :class:`Capture` on any device: it repeats the Python call."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def warm_up(self, work: Callable[[], Carry]) -> Carry:
        return work()

    def record(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        assert self._work is not None
        self._work()


class _Recorded:
    """One body: first run as it is, then recorded, then replayed."""

    def __init__(self, capture: Capture):
        self.capture = capture
        self.after: Signature = ()  # of the carry it returns
        self.evaluations = 0  # rows that one run evaluates
        self.ready = False


class Graphs:
    """A :class:`~twnn_plugin.solvers.masked.Runner` by graphs.

    What a body does is determined by its phase and by the shapes of the carry. When both occur for
    the second time the body is captured, reading and writing memory that belongs to those shapes;
    from then on it is replayed. Graphs hold for one solve: they read the context where it lies.

    Args:
        new_capture: makes what records one body.
    """

    def __init__(self, new_capture: Callable[[], Capture] = CudaCapture):
        self.new_capture = new_capture
        self.replays = 0
        self._recorded: dict[Signature, _Recorded] = {}
        self._memory: dict[Signature, Carry] = {}
        self._size = -1

    def __call__(self, body: Body, carry: Carry, phase: tuple[Any, ...], problem: Problem) -> Carry:
        if problem.size != self._size:  # the context lies elsewhere now
            self._recorded.clear()
            self._memory.clear()
            self._size = problem.size
        before = _signature(carry)
        recorded = self._recorded.get((phase, before))
        if recorded is None:
            return self._first(body, carry, (phase, before), problem)
        counted = problem.evaluations + recorded.evaluations
        source = self._fill(before, carry)
        if not recorded.ready:
            target = self._fill(recorded.after, None)
            recorded.capture.record(lambda: _feed(body(source), source, target))
            recorded.ready = True
        recorded.capture.replay()
        self.replays += 1
        problem.evaluations = counted  # a replay does not pass through evaluate; a recording does
        return self._memory[recorded.after]

    def _first(self, body: Body, carry: Carry, key: Signature, problem: Problem) -> Carry:
        if len(self._recorded) >= _MOST:
            raise OptionError(
                f"cuda_graphs has nothing to repeat: the state of this solver has had {_MOST} different "
                "structures. Keep plain Python values in it (counters) from growing, or leave cuda_graphs "
                "out."
            )
        recorded = _Recorded(self.new_capture())
        evaluated = problem.evaluations
        following = _apart(recorded.capture.warm_up(lambda: body(carry)), carry)
        recorded.evaluations = problem.evaluations - evaluated
        recorded.after = _signature(following)
        self._recorded[key] = recorded
        # Memory of that shape; it is filled when it is read from.
        self._memory.setdefault(recorded.after, rebuild(following, _empty_like))
        return following

    def _fill(self, signature: Signature, carry: Carry | None) -> Carry:
        """The memory of a signature, holding ``carry``."""
        if signature not in self._memory:
            assert carry is not None
            self._memory[signature] = rebuild(carry, _empty_like)
        memory = self._memory[signature]
        if carry is not None:
            for to, leaf in zip(leaves(memory), leaves(carry), strict=True):
                if isinstance(leaf, Tensor) and leaf is not to:
                    to.copy_(leaf)
        return memory


def _empty_like(leaf: Any) -> Any:
    return torch.empty_like(leaf, memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf


def _signature(carry: Carry) -> Signature:
    """Structure, shapes and dtypes of the tensors, and every other leaf as it is."""
    structure = rebuild(carry, lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf)
    return (repr(structure),)


def _feed(result: Carry, source: Carry, target: Carry) -> None:
    """Write the result to the target, which may be the source."""
    for to, leaf in zip(leaves(target), leaves(_apart(result, source)), strict=True):
        if isinstance(leaf, Tensor):
            to.copy_(leaf)


def _apart(result: Carry, source: Carry) -> Carry:
    """The result with copies of what lies in the source's memory, where a method may have written anew."""
    taken = {leaf.untyped_storage().data_ptr() for leaf in leaves(source) if isinstance(leaf, Tensor)}

    def apart(leaf: Any) -> Any:
        shared = isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in taken
        return leaf.clone() if shared else leaf

    return rebuild(result, apart)
