"""How CUDA graphs are captured, on stand-ins for what torch has for it: streams, graphs, a device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import twnn_plugin as tw
from twnn_plugin.solvers import graphs
from twnn_plugin.solvers.graphs import CudaCapture


class Stream:
    def __init__(self, device: int):
        self.device, self.waited = device, []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Graph:
    """Refuses to end a capture that something went wrong in, as CUDA does."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.captured_on, self.mode = cuda, None, None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.cuda.capturing is None
        self.captured_on, self.mode = self.cuda.stream, capture_error_mode
        self.cuda.capturing = self

    def capture_end(self) -> None:
        self.cuda.capturing = None
        if self.cuda.spoiled:
            raise RuntimeError("operation failed due to a previous error during capture")


class Cuda:
    """The state of the pretended library."""

    def __init__(self) -> None:
        self.device, self.sync, self.spoiled = 0, 0, False
        self.capturing: Graph | None = None
        self.stream = self.main = Stream(0)
        self.made: list[Stream] = []

    def new_stream(self) -> Stream:
        self.made.append(Stream(self.device))
        return self.made[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def set_sync(self, mode: int | str) -> None:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.sync = mode if isinstance(mode, int) else ["default", "warn", "error"].index(mode)

    def item(self) -> float:
        """What waits for the device."""
        if self.sync == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            self.spoiled = True
            raise RuntimeError("operation not permitted when stream is capturing")
        return 1.0


@pytest.fixture
def cuda(monkeypatch):
    here = Cuda()
    monkeypatch.setattr(graphs, "_sides", threading.local())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(here))
    monkeypatch.setattr(torch.cuda, "Stream", here.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", here.on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: here.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here.stream)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: here.sync)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", here.set_sync)
    return here


def test_captures_of_a_device_share_a_stream_of_their_own(cuda):
    done = []
    for device in (0, 1, 0):
        cuda.device = device
        capture = CudaCapture()
        assert capture.warm_up(lambda: (torch.ones(1),)) == (torch.ones(1),)
        capture.record(lambda: done.append(cuda.stream))
    # cuBLAS keeps a workspace for every stream; and a device's work cannot be captured on another's.
    assert [stream.device for stream in cuda.made] == [0, 1]
    assert done == [cuda.made[0], cuda.made[1], cuda.made[0]]
    assert cuda.stream is cuda.main and cuda.main.waited == [cuda.made[0], cuda.made[1], cuda.made[0]]
    assert all(
        stream.waited == [cuda.main] * 2 * times for stream, times in zip(cuda.made, (2, 1), strict=True)
    )


def test_two_threads_do_not_capture_on_one_stream(cuda):
    CudaCapture()
    thread = threading.Thread(target=CudaCapture)
    thread.start()
    thread.join()
    assert len(cuda.made) == 2


def test_a_capture_that_would_wait_is_ended_before_cuda_calls_it_off(cuda, recwarn):
    capture, cuda.sync = CudaCapture(), 1
    with pytest.raises(tw.MapError, match="captured in a CUDA graph: called a synchronizing"):
        capture.record(cuda.item)
    assert not cuda.spoiled and cuda.capturing is None
    assert cuda.stream is cuda.main and cuda.sync == 1  # all as it was
    good = CudaCapture()
    good.record(lambda: None)  # others can follow
    assert good._graph.mode == "thread_local"  # another thread may pin memory meanwhile
    assert cuda.item() == 1.0 and not recwarn.list


def test_what_went_wrong_first_is_named(cuda):
    def illegal() -> None:
        cuda.spoiled = True
        raise RuntimeError("not permitted while capturing")

    with pytest.raises(tw.MapError, match="CUDA graph: not permitted while capturing") as caught:
        CudaCapture().record(illegal)
    assert "not permitted" in str(caught.value.__cause__)
    assert cuda.stream is cuda.main and cuda.sync == 0


def test_errors_of_the_map_come_through(cuda):
    def wrong() -> None:
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        CudaCapture().record(wrong)
    assert cuda.capturing is None and cuda.stream is cuda.main and cuda.sync == 0
